"""How long would the kernels take on an H200? *Predicted*, on a machine without a GPU.

    python -m benchmarks.gpu_model                                   # every row of rows.py
    python -m benchmarks.gpu_model deepvit_s vit_s --json FILE

Each Triton launch of an operator's call is compiled for sm_90 as a real launch would specialise it, each CUDA kernel by
nvcc. Its machine code is executed for its integers (``execution.py``), so that branches and loops go as they would;
what one warp runs then goes through a model of one multiprocessor (``multiprocessor.py``): issue slots, pipes, shared
memory and L2, latencies, barriers, asynchronous copies, occupancy. What torch is asked for beside that, such as padded
copies, counts by its bytes, and every launch takes the least time of one.

It is good for comparing two versions of a kernel and for seeing what limits them. It is optimistic (no bank conflicts,
no instruction cache, all data in the L2), perhaps 30 % off in absolute terms; a kernel counts as faster than another
path only with a factor of 1.5 in hand. Its numbers never stand in one table with measurements.
"""
