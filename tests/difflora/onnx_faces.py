"""Tiny ONNX detectors and a recogniser whose answers can be worked out by hand.

A detector sees a face wherever a cell of its 8-pixel grid is red, and a large one where a cell of its 16-pixel grid is
blue; boxes and points lie at fixed distances from the cell.
"""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

GRIDS = (8, 16, 32)
SIDES = np.array([3.0, 4.0, 5.0, 6.0])  # left, top, right, bottom of a box, in cells
POINTS = np.array([[-1.0, -1.5], [1.5, -1.25], [0.25, 0.5], [-0.75, 2.0], [1.0, 2.25]])  # in cells
COLOURS = {8: (1, -1, -1), 16: (-1, -1, 1), 32: (0, 0, 0)}


class Graph:
    def __init__(self):
        self.nodes, self.values, self.inputs, self.outputs = [], [], [], []

    def constant(self, name, value):
        self.values.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def per_cell(self, source, name, grid, weights, bias, shape, activation=None):
        """An output of ``shape``: a convolution over whole cells, channels last."""
        kernel = np.repeat(np.repeat(np.asarray(weights, np.float32)[:, :, None, None], grid, 2), grid, 3) / grid**2
        self.constant(f"{name}_w", kernel)
        self.constant(f"{name}_b", np.asarray(bias, np.float32))
        self.nodes.append(
            helper.make_node(
                "Conv", [source, f"{name}_w", f"{name}_b"], [f"{name}_c"], kernel_shape=[grid] * 2, strides=[grid] * 2
            )
        )
        last = f"{name}_c"
        if activation:
            self.nodes.append(helper.make_node(activation, [last], [f"{name}_a"]))
            last = f"{name}_a"
        self.nodes.append(helper.make_node("Transpose", [last], [f"{name}_t"], perm=[0, 2, 3, 1]))
        self.nodes.append(
            helper.make_node("Reshape", [f"{name}_t", self.constant(f"{name}_s", np.array(shape))], [name])
        )
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)))

    def save(self, path: Path, shape) -> Path:
        taken = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "tiny", taken, self.outputs, self.values)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        save(model, path)
        return path


def scrfd(path: Path, points: bool = True, side: int | str = "?") -> Path:
    """Two anchors a cell, of which the second never answers; input (x - 127.5) / 128."""
    graph = Graph()
    for grid in GRIDS:
        graph.per_cell("input", f"score{grid}", grid, [COLOURS[grid], (0, 0, 0)], [-1.5, -10], [-1, 1])
    for grid in GRIDS:
        graph.per_cell("input", f"box{grid}", grid, np.zeros((8, 3)), np.tile(SIDES, 2), [-1, 4])
    for grid in GRIDS if points else ():
        graph.per_cell("input", f"points{grid}", grid, np.zeros((20, 3)), np.tile(POINTS.ravel(), 2), [-1, 10])
    return graph.save(path, [1, 3, side, side])


def yunet(path: Path) -> Path:
    """One anchor a cell; input BGR bytes; widths are logarithms, centres and points count from the cell's place."""
    graph, box = Graph(), [0.5, 0.25, np.log(8.0), np.log(10.0)]
    for name, channels, bias in (("cls", 1, None), ("obj", 1, [1.0]), ("bbox", 4, box), ("kps", 10, POINTS.ravel())):
        for grid in GRIDS:
            weights = np.zeros((channels, 3))
            if bias is None:
                weights = np.asarray([COLOURS[grid][::-1]]) / 255
            graph.per_cell("input", f"{name}_{grid}", grid, weights, [0.0] if bias is None else bias, [1, -1, channels])
    return graph.save(path, [1, 3, "height", "width"])


def recogniser(path: Path, side: int = 112, batch: int | None = None) -> Path:
    """Means of 7 x 7 patches of each channel, [n, 147]."""
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "n", 3, side, side])
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch or "n", 3 * (side // 16) ** 2])
    graph = helper.make_graph(nodes, "tiny", [taken], [given])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path
