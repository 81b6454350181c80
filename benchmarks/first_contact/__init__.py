"""All that is to be learnt on a borrowed GPU, in two runs of minutes that cannot come back with nothing.

    python -m benchmarks.first_contact --out DIR --seconds 330
    python -m benchmarks.first_contact --out DIR --seconds 360 --part two

Part one: the device; the extension, built where none was carried along; a small forward and backward of every operator
and backend; the parity suite; the goals' rows; ncu's counters beside the model's predictions; all other rows as far as
time allows. Part two: the goals over max-autotune; compute-sanitizer; peak memory of a training step; whole models; the
caches, packed. ``--only`` runs some of the steps.

Every item of a step runs in a process that may crash or hang, within a share of the time that is left. Each row is
appended to ``DIR/part-one.jsonl`` as soon as it is known, what is printed to ``DIR/part-one.log``; ``DIR/part-one.txt``
sums up: failures first, the goals reached, predictions beside measurements. Kernels that were never proven on a GPU are
enabled (FASTVIT_UNPROVEN=1). What is compiled stays in ``build/first_contact``.
"""
