"""Encoders of real pictures: alignment against closed forms, tiny ONNX faces, tiny CLIP and DINOv2, refusals."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from smidgen.difflora.generator import encoders
from smidgen.difflora.generator.encoders import arcface, faces, vision
from smidgen.errors import ConfigError, MissingExtraError
from tests.difflora import onnx_faces

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(*cells, size=(640, 640)) -> Image.Image:
    """Black, with coloured squares (left, top, side, colour)."""
    image = Image.new("RGB", size)
    for left, top, side, colour in cells:
        image.paste(colour, (left, top, left + side, top + side))
    return image


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    onnx_faces.recogniser(folder / "tiny_r50.onnx")
    onnx_faces.scrfd(folder / "det_tiny.onnx")
    return folder


# ---- alignment -------------------------------------------------------------------------------------------------------


def test_a_similarity_is_found_exactly_and_points_land_on_the_template():
    angle, scale, shift = 0.4, 1.7, np.array([30.0, -12.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (faces.TEMPLATE - shift) @ np.linalg.inv(turn).T  # so that turn p + shift is the template
    found = faces.similarity(points)
    np.testing.assert_allclose(found, np.c_[turn, shift], atol=1e-9)
    np.testing.assert_allclose(points @ found[:, :2].T + found[:, 2], faces.TEMPLATE, atol=1e-9)


def test_noisy_points_get_the_least_squares_answer_of_umeyama():
    rng = np.random.default_rng(0)
    points = faces.TEMPLATE * 3 + rng.normal(0, 4, (5, 2)) + 50
    a, b = points - points.mean(0), faces.TEMPLATE - faces.TEMPLATE.mean(0)
    left, values, right = np.linalg.svd(b.T @ a / 5)
    sign = np.diag([1, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    turn = left @ sign @ right
    scale = np.trace(np.diag(values) @ sign) / a.var(0).sum()
    shift = faces.TEMPLATE.mean(0) - scale * turn @ points.mean(0)
    np.testing.assert_allclose(faces.similarity(points), np.c_[scale * turn, shift], atol=1e-9)


def test_a_mirrored_face_is_not_mirrored_back():
    mirrored = faces.TEMPLATE * (-1, 1)
    assert np.linalg.det(faces.similarity(mirrored)[:, :2]) > 0
    with pytest.raises(ValueError, match="no scale"):
        faces.similarity(np.ones((5, 2)))


def test_an_aligned_face_has_its_points_where_they_belong():
    pixels = np.zeros((300, 300, 3), np.uint8)
    points = (faces.TEMPLATE * 2 + (40, 20)).round()
    for x, y in points.astype(int):
        pixels[y - 2 : y + 3, x - 2 : x + 3] = 255
    face = faces.align(pixels, points)
    assert face.shape == (112, 112, 3)
    for x, y in faces.TEMPLATE.round().astype(int):
        assert face[y, x].min() > 150
    assert (face > 100).any(2).mean() < 0.01


# ---- detectors -------------------------------------------------------------------------------------------------------


def test_scrfd_boxes_and_points_are_those_of_the_cells(models):
    detector = faces.load_detector(models / "det_tiny.onnx")
    assert isinstance(detector, faces.Scrfd)
    [face] = detector.find(np.asarray(picture((320, 240, 8, RED))))
    np.testing.assert_allclose(face.box, [320 - 24, 240 - 32, 320 + 40, 240 + 48], atol=1e-3)
    np.testing.assert_allclose(face.points, onnx_faces.POINTS * 8 + (320, 240), atol=1e-3)


def test_scrfd_scales_oblong_pictures_and_sorts_by_size(models):
    detector = faces.load_detector(models / "det_tiny.onnx")
    found = detector.find(np.asarray(picture((160, 80, 16, RED), (960, 320, 32, BLUE), size=(1280, 640))))
    assert [round(face.area) for face in found] == [8 * 10 * 32**2, 8 * 10 * 16**2]
    np.testing.assert_allclose(found[1].points, onnx_faces.POINTS * 16 + (160, 80), atol=1e-3)
    np.testing.assert_allclose(found[0].points, onnx_faces.POINTS * 32 + (960, 320), atol=1e-3)


def test_overlapping_boxes_are_one_face(models):
    detector = faces.load_detector(models / "det_tiny.onnx")
    assert len(detector.find(np.asarray(picture((320, 240, 8, RED), (328, 240, 8, RED))))) == 1


def test_a_face_too_large_at_one_scale_is_found_at_the_smaller(models, tmp_path):
    pixels = np.asarray(picture((320, 240, 16, RED)))  # 8 pixels at scale 320; at 640 four cells answer
    once = faces.load_detector(models / "det_tiny.onnx")
    once.sizes = (320,)
    [face] = once.find(pixels)
    np.testing.assert_allclose(face.points, onnx_faces.POINTS * 16 + (320, 240), atol=1e-3)
    assert faces.load_detector(onnx_faces.scrfd(tmp_path / "fixed.onnx", side=256)).sizes == (256,)


def test_yunet_is_read_by_opencv(tmp_path):
    detector = faces.load_detector(onnx_faces.yunet(tmp_path / "yunet.onnx"))
    assert isinstance(detector, faces.YuNet)
    [face] = detector.find(np.asarray(picture((320, 240, 8, RED))))
    np.testing.assert_allclose(face.points, onnx_faces.POINTS * 8 + (320, 240), atol=1e-2)
    np.testing.assert_allclose(face.box, [324 - 32, 242 - 40, 324 + 32, 242 + 40], atol=1)  # whole pixels
    assert detector.find(np.zeros((200, 300, 3), np.uint8)) == []


# ---- ArcFace ---------------------------------------------------------------------------------------------------------


def test_arcface_encodes_the_largest_face_and_says_who_has_none(models, caplog):
    encoder = encoders.load(f"arcface:{models / 'tiny_r50.onnx'}")  # the detector beside it
    two = picture((160, 160, 8, RED), (400, 400, 16, BLUE))
    features = encoder.encode([picture((320, 240, 8, RED)), Image.new("RGB", (50, 80)), two])
    assert features.shape == (3, encoder.width) and features.dtype == torch.float32
    assert features.isnan().all(1).tolist() == [False, True, False]
    assert "1 of 3 pictures show several faces" in caplog.text
    large = np.asarray(two)
    crop = faces.align(large, onnx_faces.POINTS * 16 + (400, 400)).astype(np.float32)
    means = ((crop - 127.5) / 127.5).reshape(7, 16, 7, 16, 3).mean((1, 3)).transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(features[2], means / np.linalg.norm(means), atol=1e-4)


def test_arcface_on_aligned_faces_and_a_model_of_fixed_batch(models, tmp_path):
    path = onnx_faces.recogniser(tmp_path / "one.onnx", batch=1)
    one = encoders.load(f"arcface:{path},aligned")
    many = encoders.load(f"arcface:{models / 'tiny_r50.onnx'},aligned")
    pictures = [picture((10 * n, 20, 30, RED), size=(112, 112)) for n in range(3)]
    torch.testing.assert_close(one.encode(pictures), many.encode(pictures))
    torch.testing.assert_close(many.encode(pictures).norm(dim=1), torch.ones(3))


def test_the_name_pins_the_weights_of_both_files(models, tmp_path):
    named = f"arcface:{models / 'tiny_r50.onnx'},{models / 'det_tiny.onnx'}"
    assert encoders.load(named).name == encoders.load(f"arcface:{models / 'tiny_r50.onnx'}").name
    other = onnx_faces.recogniser(tmp_path / "tiny_r50.onnx", batch=1)
    changed = encoders.load(f"arcface:{other},{models / 'det_tiny.onnx'}").name
    assert changed != encoders.load(named).name and changed.startswith("arcface:tiny_r50.onnx@")
    assert str(tmp_path) not in changed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arcface", "arcface:FILE.onnx"),
        ("arcface:{0}/tiny_r5.onnx", r"There is no file .*Did you mean 'tiny_r50.onnx'"),
        ("arcface:{0}/det_tiny.onnx", r"no recognition model.*\[n, 3, 112, 112\]"),
        ("arcface:{0}/text.onnx", "no ONNX model"),
        ("arcface:{0}/tiny_r50.onnx,{0}/tiny_r50.onnx", "no face detector with five points: it has 1 outputs"),
        ("arcface:{1}/blind/r.onnx", "None lies beside it.*,aligned"),
        ("arcface:{1}/wide/r.onnx,aligned", r"no recognition model.*96, 96"),
        ("arcface:{1}/blind/r.onnx,{1}/boxes.onnx", "it has 6 outputs.*key points"),
    ],
)
def test_refusals_of_faces(name, message, models, tmp_path):
    (models / "text.onnx").write_text("hello")
    for folder, side in (("blind", 112), ("wide", 96)):
        (tmp_path / folder).mkdir()
        onnx_faces.recogniser(tmp_path / folder / "r.onnx", side)
    onnx_faces.scrfd(tmp_path / "boxes.onnx", points=False)
    with pytest.raises(ConfigError, match=message):
        encoders.load(name.format(models, tmp_path))


@pytest.mark.parametrize("library", ["onnxruntime", "cv2"])
def test_a_missing_library_names_the_extra(library, models, monkeypatch):
    encoder = encoders.load(f"arcface:{models / 'tiny_r50.onnx'}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"smidgen\[faces\]"):
        encoders.load(f"arcface:{models / 'tiny_r50.onnx'}")
        encoder.encode([picture((320, 240, 8, RED))])


# ---- transformers ----------------------------------------------------------------------------------------------------


def clip_model():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    layers["projection_dim"] = 12
    eyes = {"image_size": 32, "patch_size": 16, **layers}
    return CLIPModel(CLIPConfig(text_config={"vocab_size": 60, **layers}, vision_config=eyes, projection_dim=12)).eval()


def dinov2_model():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Dinov2Model(Dinov2Config(**sizes)).eval()


def written(model, folder, **processor):
    model.save_pretrained(folder)
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


PICTURES = [picture((5, 5, 20, RED), size=(60, 40)), picture((20, 9, 30, BLUE), size=(64, 64))]


def test_clip_answers_its_projected_embedding(tmp_path):
    model = clip_model()
    folder = written(
        model, tmp_path / "clip", size={"shortest_edge": 32}, crop_size=32, do_center_crop=True, resample=3
    )
    encoder = encoders.load(f"clip:{folder}")
    from transformers import CLIPImageProcessor

    with vision.bases.quiet():
        pixels = CLIPImageProcessor.from_pretrained(folder)(images=PICTURES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(encoder.encode(PICTURES), wanted, atol=1e-5, rtol=1e-4)
    assert encoder.width == 12 and not any(p.requires_grad for p in encoder.network.parameters())


def test_dinov2_answers_its_class_token_and_any_model_of_pictures_works(tmp_path):
    model = dinov2_model()
    folder = written(model, tmp_path / "dino", size={"height": 28, "width": 28}, resample=3)
    with torch.no_grad():
        small = torch.stack([torch.from_numpy(np.asarray(p.resize((28, 28), 3)).astype(np.float32)) for p in PICTURES])
        pixels = (small.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor(
            [0.2, 0.3, 0.4]
        )[:, None, None]
        wanted = model(pixels).last_hidden_state[:, 0]
    for name in (f"dinov2:{folder}", f"vision:{folder}"):
        torch.testing.assert_close(encoders.load(name).encode(PICTURES), wanted, atol=1e-5, rtol=1e-4)


def test_a_pooler_that_nobody_trained_is_not_used(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = written(ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes)), tmp_path / "vit")
    first, second = (encoders.load(f"vision:{folder}").encode(PICTURES) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_the_name_pins_the_weights_and_the_preparation(tmp_path):
    model = dinov2_model()
    folder = written(model, tmp_path / "dino")
    first = encoders.load(f"vision:{folder}").name
    assert encoders.load(f"vision:{folder}").name == first
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert encoders.load(f"vision:{written(model, folder)}").name != first
    second = encoders.load(f"vision:{folder}").name
    assert encoders.load(f"vision:{written(model, folder, image_mean=[0.1] * 3)}").name != second


def test_refusals_of_the_transformers_family(tmp_path):
    from safetensors.torch import load_file, save_file

    from smidgen.bases.packaged import debug

    folder = written(dinov2_model(), tmp_path / "dino")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layer.1" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"does not hold all weights of a Dinov2Model.*missing"):
        encoders.load(f"vision:{folder}")
    with pytest.raises(ConfigError, match="There is no model folder"):
        encoders.load("clip:./nowhere")
    with pytest.raises(ConfigError, match=r"'openai/clip-vit-large-patch14' cannot be loaded"):
        encoders.load("clip")  # tests are offline
    with pytest.raises(ConfigError, match="vision:FOLDER"):
        encoders.load("vision")
    with pytest.raises(ConfigError, match="does not take pictures alone"):
        encoders.load(f"vision:{debug.model_folder('debug-text')}")
    with pytest.raises(ConfigError, match="Did you mean 'arcface'"):
        encoders.load("arcfaces:x.onnx")


def test_batches_do_not_change_answers(models, tmp_path, monkeypatch):
    encoder = encoders.load(f"vision:{written(dinov2_model(), tmp_path / 'dino')}")
    whole = encoder.encode(PICTURES * 3)
    monkeypatch.setattr(vision, "BATCH", 2)
    torch.testing.assert_close(encoder.encode(PICTURES * 3), whole, atol=1e-5, rtol=1e-5)
    assert arcface.BATCH > 1


def test_a_generator_holds_to_the_weights_it_was_made_with(models):
    from smidgen.difflora.generator.generator import Generator
    from smidgen.difflora.generator.settings import Encoders, Model

    seen = Encoders(face=f"arcface:{models / 'tiny_r50.onnx'}")
    generator = Generator("base", None, torch.nn.Identity(), seen, Model())
    generator.saw = {"face": "arcface:tiny_r50.onnx@0123456789abcdef,aligned"}
    with pytest.raises(ConfigError, match=r"made with arcface:tiny_r50.onnx@0123456789abcdef.*Put the file"):
        generator.face  # noqa: B018
    generator.saw = {"face": encoders.load(seen.face).name}
    assert generator.face.width == 147
