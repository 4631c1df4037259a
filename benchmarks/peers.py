"""Other quantizers of float models for a CPU, as their own guides use them.

Each takes a task and returns what to call; one that is not installed raises `ImportError`, and its
row says so.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxq.lowering.cpu.onednn import cpu_int8

Inputs = tuple[Tensor, ...]


def pt2e(model: nn.Module, calibration: list[Inputs], *, reduce_range: bool) -> nn.Module:
    """Quantize as torchao's PT2E guide for x86 does; Inductor compiles the result, frozen."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
    exported = torch.export.export(model, calibration[0]).module()
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    for inputs in calibration:
        prepared(*inputs)
    return convert_pt2e(prepared)


def quantize_(model: nn.Module) -> nn.Module:
    """Quantize with torchao's one-liner, dynamically; Inductor compiles the result, frozen."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return quantized


def onnx_runtime(
    model: nn.Module, calibration: list[Inputs], threads: int
) -> Callable[..., Tensor]:
    """Export to ONNX, quantize statically in ONNX Runtime's default way, run with its CPU provider.

    Weights have 7 bits where the processor lacks VNNI, as its guide advises.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, names: list[str]) -> None:
            self.batches: Iterator[dict[str, Any]] = iter(
                [dict(zip(names, (x.numpy() for x in inputs), strict=True))
                 for inputs in calibration]
            )  # fmt: skip

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/float.onnx"
        torch.onnx.export(model, calibration[0], path, dynamo=True, external_data=False)
        prepared = f"{folder}/prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        names = [i.name for i in onnx.load(prepared).graph.input]
        quantized = f"{folder}/int8.onnx"
        quantize_static(
            prepared, quantized, Reader(names), per_channel=True, weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8, reduce_range=cpu_int8().saturates,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(quantized, options, ["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> Tensor:
        feeds = dict(zip(names, (x.numpy() for x in inputs), strict=True))
        return torch.from_numpy(session.run(None, feeds)[0])

    return call


def openvino(
    model: nn.Module, calibration: list[Inputs], threads: int, *, transformer: bool
) -> Callable[..., Tensor]:
    """Convert to OpenVINO, quantize with NNCF's defaults or its preset for transformers."""
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=calibration[0])
    dataset = nncf.Dataset(calibration, lambda inputs: [x.numpy() for x in inputs])
    preset = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    quantized = nncf.quantize(converted, dataset, subset_size=len(calibration), **preset)
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(quantized, "CPU", config)

    def call(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(compiled([x.numpy() for x in inputs])[0].copy())

    return call
