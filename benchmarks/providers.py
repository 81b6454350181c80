"""Who runs a model: eager PyTorch, compilers, other runtimes, other libraries' models, and fastvit.

A provider is one function from the plain model and example inputs to a callable, or :class:`Absent` with the reason.
What can be told without a process (no such package, no GPU) :func:`absence` tells.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvit
from benchmarks.worker import Absent, Case

ENVIRONMENTS = Path(__file__).resolve().parents[1] / ".venv" / "bench"
Run = Callable[..., Any]


class Provider(NamedTuple):
    """How to build a contender, and what it needs."""

    build: Callable[[nn.Module, tuple[Tensor, ...], Case], Run]
    about: str
    packages: tuple[str, ...] = ()
    training: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    apart: bool = False
    """Tied to a version of torch: it has an environment of its own, ``.venv/bench/NAME``."""


def python_of(name: str) -> Path:
    """The interpreter of the environment of a provider that has one of its own."""
    return ENVIRONMENTS / name / "bin" / "python"


def absence(name: str, provider: Provider, case: Case) -> str | None:
    """Why a provider cannot take part in a case, as far as that can be told beforehand."""
    device = case.device.partition(":")[0]
    if device not in provider.devices:
        return f"runs on {' or '.join(provider.devices)}, this is {device}"
    if case.training and not provider.training:
        return "inference only"
    if case.dtype not in provider.dtypes:
        return f"runs in {' or '.join(provider.dtypes)}, this is {case.dtype}"
    if provider.apart:
        return None if python_of(name).exists() else f"not installed: make bench-{name}"
    missing = [package for package in provider.packages if importlib.util.find_spec(package) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def eager(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    return model


def channels_last(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    model = model.to(memory_format=torch.channels_last)
    return lambda images: model(images.contiguous(memory_format=torch.channels_last))


def compiled(**options: Any) -> Callable[[nn.Module, tuple[Tensor, ...], Case], Run]:
    return lambda model, example, case: torch.compile(model, dynamic=False, **options)


def freezing(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    torch._inductor.config.freezing = True
    return torch.compile(model, dynamic=False)


def max_autotune(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    torch._inductor.config.freezing = case.device == "cpu" and not case.training  # its templates need constant weights
    return torch.compile(model, dynamic=False, mode="max-autotune")


def _exported(model: nn.Module, example: tuple[Tensor, ...], folder: str) -> str:
    """The model as an ONNX file."""
    path = str(Path(folder) / "model.onnx")
    torch.onnx.export(model, example, path, dynamo=True, optimize=True, verbose=False)
    return path


def onnxruntime(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    gpu = case.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        providers = ["CUDAExecutionProvider"] if gpu else ["CPUExecutionProvider"]
        if not set(providers) <= set(ort.get_available_providers()):
            raise Absent(f"this build of ONNX Runtime has {', '.join(ort.get_available_providers())}")
        session = ort.InferenceSession(_exported(model, example, folder), options, providers=providers)
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {name: images.numpy(force=True)})]


def openvino(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[case.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    # Its bfloat16 is a hint for a model in float32.
    wide = tuple(each.float() for each in example)
    with torch.no_grad():
        converted = openvino.convert_model(
            model.float(), example_input=wide, input=[tuple(each.shape) for each in wide]
        )
    ready = openvino.Core().compile_model(converted, "CPU", settings)
    request = ready.create_infer_request()

    def run(images: Tensor) -> list[Tensor]:
        found = request.infer([images.float().numpy()], share_inputs=True, share_outputs=False)
        return [torch.from_numpy(found[port]).to(case.torch_dtype) for port in ready.outputs]

    return run


def zentorch(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    if fastvit.backends.describe()["devices"][0].get("vendor") != "amd":
        raise Absent("made for AMD CPUs")
    import zentorch  # noqa: F401 - registers the compiler

    return torch.compile(model, dynamic=False, backend="zentorch")


def tensorrt(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    import torch_tensorrt

    return torch_tensorrt.compile(model, ir="dynamo", inputs=list(example), enabled_precisions={case.torch_dtype})


def cuda_graphs(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    return torch.cuda.make_graphed_callables(model, example)


def sdpa(backend: str) -> Callable[[nn.Module, tuple[Tensor, ...], Case], Run]:
    """The patched model with attention by one of SDPA's back ends."""

    def build(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        fused = fastvit.patch(model, ops=["masked_attention"], backend="sdpa")

        def run(images: Tensor) -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return fused(images)

        return run

    return build


def fused(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    return fastvit.patch(model)


def fused_compiled(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    return torch.compile(fastvit.patch(model), dynamic=False)


def fused_graphs(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    return cuda_graphs(fastvit.patch(model), example, case)


def _packaged(program: torch.export.ExportedProgram, configs: dict[str, Any]) -> Run:
    """By AOTInductor, loaded from its package as a program without Python would."""
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs=configs
        )
        return torch._inductor.aoti_load_package(path)


def aotinductor(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    with torch.no_grad():
        return _packaged(torch.export.export(model, example), {"freezing": True})


def fused_aotinductor(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
    with fastvit.exporting(fused=True):
        program = torch.export.export(fastvit.patch(model), example)
    return _packaged(program, fastvit.deployment.inductor_configs())


def _same_in_timm(model: nn.Module, name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise Absent(f"timm {timm.__version__} has no model {name!r}")
    return timm.create_model(name, num_classes=1000, img_size=model.img_size)


def _same_in_transformers(model: nn.Module, name: str) -> nn.Module:
    import transformers

    family = fastvit.reference.registry.VARIANTS[name].family
    if name == "cvt_13":
        return transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=1000))
    if family not in ("vit", "deit"):
        raise Absent(f"transformers has no {name}")
    sizes = {
        "hidden_size": model.num_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": 4 * model.num_features,
        "image_size": model.img_size[0],
        "patch_size": model.patch_size[0],
        "num_labels": 1000,
    }
    if family == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, layer_norm_eps=1e-6))
    config = transformers.DeiTConfig(**sizes, layer_norm_eps=1e-6)
    return transformers.DeiTForImageClassificationWithTeacher(config)


def give_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a model of another library the weights of ours.

    ``fastvit.load_weights`` only moves numbers: from a target whose parameters are numbered it tells, for each number
    of ours, where it belongs.
    """
    numbered, start = {}, 0
    for name, tensor in target.state_dict().items():
        numbered[name] = torch.arange(start, start + tensor.numel(), dtype=torch.float64).view(tensor.shape)
        start += tensor.numel()
    places = copy.deepcopy(source).double()
    fastvit.load_weights(places, numbered)
    flat = torch.cat([tensor.detach().double().flatten() for tensor in target.state_dict().values()])
    ours = source.state_dict()
    for name, where in places.state_dict().items():
        if where.is_floating_point():
            flat[where.flatten().long()] = ours[name].double().flatten()
    given, start = {}, 0
    for name, tensor in target.state_dict().items():
        given[name] = flat[start : start + tensor.numel()].view(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    target.load_state_dict(given)


def library(same: Callable[[nn.Module, str], nn.Module]) -> Callable[[nn.Module, tuple[Tensor, ...], Case], Run]:
    """The same model of another library, as it comes, with the same weights."""

    def build(model: nn.Module, example: tuple[Tensor, ...], case: Case) -> Run:
        if case.name not in fastvit.list_models():
            raise Absent("the row is that library's model already")
        other = same(model, case.name)
        give_weights(model, other)
        return other.to(case.device, case.torch_dtype).train(case.training)

    return build


PROVIDERS: Mapping[str, Provider] = {
    "eager": Provider(eager, "the plain model in PyTorch's eager mode"),
    "channels-last": Provider(channels_last, "eager, images and convolutions in channels-last layout"),
    "inductor": Provider(compiled(), "torch.compile"),
    "inductor-freezing": Provider(freezing, "torch.compile with constant weights", training=False),
    "inductor-max-autotune": Provider(max_autotune, "torch.compile, mode max-autotune"),
    "aotinductor": Provider(
        aotinductor, "AOTInductor, constant weights, as a C++ program runs it", training=False, devices=("cpu",)
    ),
    "onnxruntime": Provider(
        onnxruntime,
        "ONNX Runtime",
        ("onnx", "onnxscript", "onnxruntime"),
        training=False,
        dtypes=("float32", "float16"),
    ),
    "openvino": Provider(
        openvino,
        "OpenVINO; in bfloat16 by its precision hint",
        ("openvino",),
        training=False,
        devices=("cpu",),
        dtypes=("float32", "bfloat16"),
    ),
    "zentorch": Provider(zentorch, "AMD's zentorch", training=False, devices=("cpu",), apart=True),
    "timm": Provider(library(_same_in_timm), "timm's model as it comes, the same weights", ("timm",)),
    "transformers": Provider(
        library(_same_in_transformers), "transformers' model as it comes, the same weights", ("transformers",)
    ),
    "sdpa-flash": Provider(sdpa("FLASH_ATTENTION"), "attention by SDPA's flash back end", devices=("cuda",)),
    "sdpa-efficient": Provider(sdpa("EFFICIENT_ATTENTION"), "by its memory-efficient one", devices=("cuda",)),
    "sdpa-cudnn": Provider(sdpa("CUDNN_ATTENTION"), "by cuDNN's", devices=("cuda",)),
    "cuda-graphs": Provider(cuda_graphs, "the plain model in CUDA graphs", devices=("cuda",)),
    "torch-tensorrt": Provider(
        tensorrt, "torch-tensorrt", training=False, devices=("cuda",), dtypes=("float32", "float16"), apart=True
    ),
    "fastvit": Provider(fused, "fastvit.patch(model)"),
    "fastvit-inductor": Provider(fused_compiled, "torch.compile of the patched model"),
    "fastvit-aotinductor": Provider(
        fused_aotinductor,
        "AOTInductor of the patched model, its operators kept",
        training=False,
        devices=("cpu",),
        dtypes=("float32", "bfloat16"),
    ),
    "fastvit-cuda-graphs": Provider(fused_graphs, "the patched model in CUDA graphs", devices=("cuda",)),
}
QUICK: Sequence[str] = ("eager", "openvino", "fastvit")
"""The sample's; ONNX Runtime's export alone takes 10 to 20 s."""


def pythons() -> dict[str, str]:
    """The interpreters of providers that have an environment of their own."""
    return {name: os.fspath(python_of(name)) for name, provider in PROVIDERS.items() if provider.apart}
