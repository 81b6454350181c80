"""The model of a multiprocessor, on kernels whose work is known by counting."""

from __future__ import annotations

import struct

import pytest
import torch

pytest.importorskip("triton.backends.nvidia", exc_type=ImportError)

from benchmarks import jobs
from benchmarks.gpu_model import __main__ as command
from benchmarks.gpu_model import cuda, launches, multiprocessor
from benchmarks.gpu_model.execution import Warp, trace
from benchmarks.gpu_model.machine_code import Instruction, bytes_of, kind_of, operands_of, parse
from benchmarks.gpu_model.rows import ROWS
from fastvit import ops
from fastvit.reference import functional

FREE = 7  # no scoreboard


def code(*lines: str, stall: int = 1) -> list[Instruction]:
    """Instructions from "[@P] NAME operands"."""
    found = []
    for number, line in enumerate(lines):
        predicate, line = line.split(" ", 1) if line.startswith("@") else ("", line)
        name, _, operands = line.partition(" ")
        found.append(
            Instruction(
                16 * number,
                predicate[1:],
                name,
                operands_of(operands),
                stall,
                FREE,
                FREE,
                0,
                kind_of(name),
                bytes_of(name),
            )
        )
    return found


def warp(*numbers: int, trips: tuple[int, ...] = (4,)) -> Warp:
    return Warp(struct.pack(f"<{len(numbers)}i", *numbers), 32, (1, 1, 1), trips)


LOOP = (
    "MOV R1, RZ",
    "FFMA R4, R4, R4, R4",
    "VIADD R1, R1, 0x10",
    "ISETP.GE.AND P0, PT, R1, c[0x0][0x210], PT",
    "@!P0 BRA 0x10",
    "EXIT",
)


@pytest.mark.parametrize(("keys", "steps"), [(1, 1), (16, 1), (17, 2), (197, 13)])
def test_a_loop_runs_as_often_as_its_arguments_say(keys, steps):
    ran = trace(code(*LOOP), warp(keys))
    assert [len(loop.ends) for loop in ran.loops] == [steps]
    assert [i.name for i in ran.instructions].count("FFMA") == steps
    assert ran.unknown == 0


def test_a_loop_whose_end_is_data_runs_an_assumed_number_of_times():
    lines = [line.replace("c[0x0][0x210]", "R9") for line in LOOP]
    ran = trace(code("LDG.E R9, [R2.64]", *(line.replace("0x10", "0x20") for line in lines)), warp(trips=(3, 9)))
    assert [len(loop.ends) for loop in ran.loops] == [3]
    assert ran.unknown == 1


def test_a_loop_that_data_skips_is_gone_around_where_it_is_to_run_never():
    lines = ["LDG.E R9, [R2.64]", "ISETP.GE.AND P0, PT, R9, RZ, PT", "@P0 BRA 0x80"]
    loop = [line.replace("c[0x0][0x210]", "R9").replace("BRA 0x10", "BRA 0x40") for line in LOOP[:-1]]
    for trips, runs in (((0,), 0), ((1,), 1), ((3,), 3)):
        ran = trace(code(*lines, *loop, "EXIT"), warp(trips=trips))
        assert [i.name for i in ran.instructions].count("FFMA") == runs
        assert ran.unknown == 1


@pytest.mark.parametrize(("a", "b"), [(197, 64), (-197, 64), (5, 7), (2363, 12)])
def test_the_division_that_compilers_write_gives_the_quotient(a, b):
    lines = (
        "IABS R6, c[0x0][0x214]", "I2F.RP R4, R6", "MUFU.RCP R4, R4", "VIADD R2, R4, 0xffffffe",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "IMAD.MOV.U32 R2, RZ, RZ, RZ", "IMAD.MOV R5, RZ, RZ, -R3",
        "IMAD R5, R5, R6, RZ", "IMAD.HI.U32 R2, R3, R5, R2", "IABS R7, c[0x0][0x210]", "IMAD.HI.U32 R2, R2, R7, RZ",
        "IMAD.MOV R3, RZ, RZ, -R2", "IMAD R3, R6, R3, R7", "ISETP.GT.U32.AND P1, PT, R6, R3, PT",
        "@!P1 IMAD.IADD R3, R3, 0x1, -R6", "@!P1 VIADD R2, R2, 0x1", "ISETP.GE.U32.AND P0, PT, R3, R6, PT",
        "@P0 VIADD R2, R2, 0x1", "LOP3.LUT R3, R8, c[0x0][0x210], RZ, 0x3c, !PT",
    )  # fmt: skip
    machine = warp(a, b)
    for i in code(*lines):
        if not i.predicate or machine.holds(i.predicate):
            machine.step(i)
    assert machine.read("R2") == abs(a) // abs(b)
    assert machine.read("R3") is None, "the exclusive or of something unknown"


def test_sixty_four_bits_are_looked_at_half_by_half():
    lines = ("LOP3.LUT P0, RZ, c[0x0][0x210], RZ, RZ, 0xfc, !PT", "LOP3.LUT P0, RZ, c[0x0][0x214], RZ, RZ, 0xfc, P0")
    for halves in ((1, 0), (0, 1), (0, 0)):
        machine = warp(*halves)
        for i in code(*lines):
            machine.step(i)
        assert machine.holds("P0") is any(halves)


def test_sixty_four_bit_sums_carry():
    machine = warp(-1, 0, 2)
    lines = ("LDC.64 R2, c[0x0][0x210]", "IADD3 R4, P0, R2, c[0x0][0x218], RZ", "IADD3.X R5, R3, RZ, RZ, P0, !PT")
    for i in code(*lines):
        machine.step(i)
    assert machine.read("R4", 8) == (1 << 32) + 1


def test_the_busiest_part_bounds_a_run_from_below_and_is_reached():
    """128 multiplications by 8 warps: a quarter issues one in a cycle, of exponentials one in 8 cycles."""
    for name, cycles in (("FFMA R1, R1, R1, R1", 128 * 2), ("MUFU.EX2 R1, R1", 128 * 2 * 8)):
        run = code(*[name] * 128)
        found, _ = multiprocessor.simulate(run, 8, 1)
        assert max(multiprocessor.pressure(run, 8).values()) == cycles
        assert cycles <= found <= 1.05 * cycles


def test_a_barrier_holds_every_warp_until_the_last():
    slow = code(*["MUFU.EX2 R1, R1"] * 50, "BAR.SYNC 0x0", "FFMA R1, R1, R1, R1")
    _, reached = multiprocessor.simulate(slow, 8, 1, marks=[49, 51])
    assert reached[51] >= reached[49] + multiprocessor.BARRIER


def test_asynchronous_copies_are_waited_for_group_by_group():
    copies = ("LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR")
    between = ["FFMA R1, R1, R1, R1"] * 200
    cycles = {}
    for left in (0, 1):
        run = code(*copies, *between, *copies, f"DEPBAR.LE SB0, {left:#x}", "EXIT")
        cycles[left], _ = multiprocessor.simulate(run, 1, 1)
    assert 200 <= cycles[1] < 330  # the first group, whose latency passed meanwhile
    assert cycles[0] >= 200 + multiprocessor.LATENCY["LDGSTS"]


def test_a_bulk_copy_is_waited_for_by_all_warps():
    run = code("UTMALDG.2D [UR4], [UR6]", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3", "EXIT")
    assert multiprocessor.simulate(run, 4, 1)[0] >= multiprocessor.LATENCY["BULK"]


def test_memory_is_a_limit_of_its_own():
    ran = trace(code(*LOOP), warp(16))
    light, heavy = (multiprocessor.predict(ran, 32, 0, 1, 132, traffic) for traffic in (0, 43_000_000))
    assert light.limiter == "launch" and light.seconds == multiprocessor.LEAST
    assert heavy.limiter == "memory" and heavy.seconds == pytest.approx(1e-5)


def test_what_is_left_out_of_a_long_loop_is_added_again():
    short, long = (trace(code(*LOOP), warp(16 * steps)) for steps in (100, 1000))
    kept, marks, missing = multiprocessor.shorten(long)
    assert missing == 1000 - multiprocessor.KEPT and marks[1] < len(kept) < 100
    times = [multiprocessor.predict(ran, 32, 0, 4, 10_000_000, 0).seconds for ran in (short, long)]
    assert times[1] / times[0] == pytest.approx(10, rel=0.1)
    whole, _ = multiprocessor.simulate(short.instructions, 4, 2)
    few = trace(code(*LOOP), warp(16 * multiprocessor.KEPT))
    assert whole > 10 * multiprocessor.simulate(few.instructions, 4, 2)[0]


def test_registers_and_shared_memory_bound_the_resident_blocks():
    assert multiprocessor.resident(202, 66560, 8) == 1
    assert multiprocessor.resident(32, 0, 4) == 16
    assert multiprocessor.resident(32, 100 * 1024, 4) == 2


def test_control_codes_are_read_from_the_text():
    text = (
        "        /*0100*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402048981 */\n"
        "                                                         /* 0x000ea4000c1e1d00 */\n"
        " Function f:\n  REG:40 STACK:8 SHARED:0"
    )
    found = parse(text)
    (i,) = found.instructions
    assert (found.registers, found.stack, i.predicate, i.kind, i.bytes) == (40, 8, "!P0", "LDG", 16)
    assert (i.stall, i.writes, i.reads, i.waits) == (2, 2, 7, 0)


def test_a_call_is_recorded_with_what_torch_is_asked_for():
    """Attention whose q has no stride 1: torch copies it."""
    q, k, v = (torch.zeros(2, 3, 50, 32, dtype=torch.bfloat16) for _ in range(3))
    with launches.recording() as found:
        ops.masked_attention(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, backend="triton")
    assert [launch.kernel for launch in found] == ["torch's clone", "masked_attention_kernel"]
    assert found[1].traffic == 4 * q.numel() * 2


def test_a_product_of_the_librarys_takes_as_long_as_its_flops_or_its_bytes():
    x, weight = torch.zeros(4096, 4096, dtype=torch.bfloat16), torch.zeros(4096, 4096, dtype=torch.bfloat16)
    with launches.recording() as found:
        torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(x, weight[:16])
    much, little = map(command.predict_launch, found)
    assert much["limiter"] == "tensor cores"
    assert much["microseconds"] == pytest.approx(1e6 * 2 * 4096**3 / multiprocessor.PRODUCTS)
    assert little["limiter"] == "memory"


def test_a_composition_has_our_convolution_and_the_librarys_products():
    if (reason := cuda.missing()) is not None:
        pytest.skip(reason)
    found = command.launches_of({row.name: row for row in ROWS}["cvt13_stage3_projection_cuda"], 0)
    ours, *products = found
    assert ours.kernel.startswith("tokens::ProjectionForward")  # of q, k and v
    assert ours.traffic == pytest.approx(2 * 64 * (197 + 197 + 50 + 50) * 384, rel=0.01)
    assert [launch.kernel for launch in products] == ["torch's addmm"] * 3
    assert sum(launch.flops for launch in products) == 2 * 64 * (197 + 50 + 50) * 384**2


def test_projections_of_other_strides_are_one_launch_each():
    if (reason := cuda.missing()) is not None:
        pytest.skip(reason)
    x = torch.zeros(2, 49, 64, dtype=torch.bfloat16)
    one = functional.Projection(torch.zeros(64, 1, 3, 3), None, torch.zeros(64, 64), None, 1)
    with launches.recording() as found, torch.no_grad():
        ops.conv_projection(x, one, one, one, grid=(7, 7), backend="cuda")
    names = [launch.kernel for launch in found if launch.build is not None]
    assert len(names) == 3 and all(name.startswith("tokens::Forward") for name in names)


def test_the_loops_of_a_streaming_kernel_are_those_of_its_keys():
    q = torch.zeros(1, 2, 500, 64, dtype=torch.float16)
    with launches.recording() as found:
        ops.masked_attention(q, q, q, backend="triton")
    (launch,) = found
    facts = command.predict_launch(launch)
    assert launch.block == 32
    assert facts["loops"] == [16] and facts["assumed_loops"] == facts["spilled"] == 0
    assert facts["grid"] == (-(-500 // 64), 2, 1)


def test_with_a_key_padding_mask_the_loop_runs_over_the_visible_keys():
    q, mask = torch.zeros(2, 2, 500, 64, dtype=torch.float16), torch.ones(2, 500, dtype=torch.bool)
    with launches.recording() as found:
        ops.masked_attention(q, q, q, mask, backend="triton")
    (launch,) = found
    facts = command.predict_launch(launch, keys=100)
    assert 4 in facts["loops"] and facts["assumed_loops"] == 2  # that of masks with gaps is gone around


def test_a_cuda_kernel_is_predicted_or_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    row = {row.name: row for row in ROWS}["cpvt_s_peg_cuda"]
    assert "nvcc" in command.predict_row(row)["skipped"]
    monkeypatch.delenv("CUDACXX")
    if (reason := cuda.missing()) is not None:
        pytest.skip(reason)
    (launch,) = command.launches_of(row, 0)
    facts = command.predict_launch(launch)
    assert facts["grid"] == (64 * 384 // 64, 1, 1) and facts["spilled"] == 0
    assert 2 in facts["loops"]  # rows of the 3x3 window behind the first


def test_every_row_names_a_job():
    assert {row.job for row in ROWS} <= {job.name for job in jobs.JOBS}
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        command, "launches_of", lambda row, configuration: [launches.Launch("torch's copy_", "", 43_000_000)]
    )
    command.main([ROWS[0].name, "--json", str(tmp_path / "out.json")])
    assert f"predicted {10.0:.1f} us" in capsys.readouterr().out
    assert '"predicted": true' in (tmp_path / "out.json").read_text()
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
