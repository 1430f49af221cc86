"""What each page's blocks need to be run: the one table of them. A page without a row has its commands parsed and its Python run as it is.

A block is *run*, or *parsed* by the parser of the program that would read it (commands that need models which no test has), or skipped
by name in ``SKIPPED``, with the reason.
"""

from dataclasses import dataclass, field

SKIPPED: dict[str, str] = {}  # page and first line of a block -> why it is neither run nor parsed; at most five


@dataclass(frozen=True)
class Page:
    """How a page's blocks are run, from top to bottom in one folder.

    Attributes:
        before: Python that gives what the reader has already: names and files. What is to end with the page it puts into ``stack``.
        slow: its Python is run by the slow tests, together with its commands, which it builds on.
        runs_commands: the slow tests run its commands, but for blocks with one of the words in ``parsed``.
        parsed: words that mark blocks which are parsed alone; each is in one.
        smaller: what is written in place of a text so that a run takes seconds; each text is there.
        apart: each Python block is a program of its own.
        elsewhere: the test that runs the page.
        needs: packages of extras that not every environment of the tests has, by a word of the blocks that want them.
        reads: for blocks of data in order, the Python that reads them: ``text`` is the block.
    """

    before: str = ""
    slow: bool = False
    runs_commands: bool = False
    parsed: tuple[str, ...] = ()
    smaller: dict[str, str] = field(default_factory=dict)
    apart: bool = False
    elsewhere: str = ""
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()


# A language model of a few thousand numbers with its tokenizer, and one that reads.
CHAT = """
import torch, smidgen
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from smidgen.bases.packaged.debug import model_folder

def chat():
    return AutoModelForCausalLM.from_pretrained(model_folder("debug-chat")).eval()

def reader():
    torch.manual_seed(0)  # its head is new each time
    return AutoModelForSequenceClassification.from_pretrained(model_folder("debug-text"), num_labels=2).eval()

def trained(model, method="svfit", **options):
    model = smidgen.adapt(model, method, **options)
    for one in model.parameters():
        if one.requires_grad:
            one.data += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    return model
"""
PIPE = """
import smidgen, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(smidgen.embedded_base(), safety_checker=None)
pipe.set_progress_bar_config(disable=True)
unet = pipe.unet
"""
PERSON = """
from smidgen import cli
assert cli.main(["subject", "pictures", "--seed", "7"]) == 0
"""
# A server of the adapters in a folder, until its page ends.
SERVER = """
import threading

def served():
    from smidgen.serving.library import Library
    from smidgen.serving.running import prepared
    from smidgen.serving.settings import Server

    library = Library("adapters", ["debug-chat", "embedded"])
    server, listener = prepared(library, Server(port=0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop():
        server.should_exit = True
        thread.join(60)
        library.close(0)

    stack.callback(stop)
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
"""
SHORT = "--max-train-steps 4 --num-prompts 1 --num-seeds 1 --inference-steps 2 --lr-warmup-steps 0 --no-compare-lora"

PAGES: dict[str, Page] = {
    "README.md": Page(
        CHAT
        + PERSON
        + """
import shutil
base = chat()
shutil.move("pictures", "my-pictures")
shutil.copy("my-pictures/001.png", "photo.png")
Path("more.csv").write_text("text,label\\nwhat a day,x\\n")
""",
        runs_commands=True,
        parsed=("make demo", "pip install"),
        smaller={
            "tweets --model minilm --budget 5kB": "debug-text --model debug-text --max-length 32 --budget 5kB",
            "--method svfit --out my-adapter": f"--method svfit {SHORT} --out my-adapter",
        },
    ),
    "docs/afternoon.md": Page(elsewhere="tests/training/test_afternoon.py"),
    "docs/new_method.md": Page(elsewhere="tests/adapters/test_new_method.py"),
    "docs/bank.md": Page(
        CHAT
        + """
model, tokenizer = chat(), AutoTokenizer.from_pretrained(model_folder("debug-chat"), padding_side="left")
three_texts = ["what is 1 plus 1 ?", "the film was good", "what is 2 plus 2 ?"]
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
for name in ("ann", "bob"):
    smidgen.save(trained(chat(), r=16, target_modules=["q_proj", "v_proj"]), f"adapters/{name}")
""",
    ),
    "docs/budget.md": Page(
        CHAT
        + """
model = reader()
first_batches = [{"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([n])} for n in (0, 1)]
def loss_of_batch(model, batch):
    return model(**batch).loss
""",
    ),
    "docs/chat.md": Page(slow=True, runs_commands=True, smaller={"--model smollm2": "--model debug-chat"}),
    "docs/cli.md": Page(
        reads=(
            """
from pathlib import Path
from smidgen import cli
Path("mine.yaml").write_text(text)
Path("pictures").mkdir()
assert cli.main(["config", "validate", "mine.yaml"]) == 0
""",
        ),
    ),
    "docs/compare.md": Page(
        reads=(
            """
from pathlib import Path
from smidgen.lab.compare.experiment import load_experiment
Path("mine.yaml").write_text(text)
assert len(load_experiment("mine.yaml").methods) == 6
""",
        ),
    ),
    "docs/control.md": Page(
        runs_commands=True,
        parsed=("/models/",),
        smaller={
            "--num-pictures 1500   #": "--num-pictures 24  #",
            "control/01499.png": "control/00023.png",
            "segmentation --out steered": (
                "segmentation --max-train-steps 2 --num-held-out 4 --train-batch-size 4 --lr-warmup-steps 0 --out steered"
            ),
        },
        reads=(
            """
from pathlib import Path
from PIL import Image
from smidgen.tasks.control.pairs import read_pairs
Path("own/control").mkdir(parents=True)
for name in ("0001.png", "control/0001.png"):
    Image.new("RGB", (64, 64), "red").save(Path("own") / name)
Path("own/metadata.jsonl").write_text(text)
assert len(read_pairs(Path("own"), "other")) == 1
""",
        ),
    ),
    "docs/difflora_generator.md": Page(
        PIPE
        + PERSON
        + """
from PIL import Image
photo = Image.open("pictures/001.png").convert("RGB")
photos = [[photo], [photo]]
photo.save("ann.jpg", quality=98, subsampling=0)
import numpy
from smidgen.bases.embedded import wide, world
rng = numpy.random.default_rng(5)
wide.in_a_hat(world.sample_identity(rng, "test").as_dict(), world.sample_scene(rng), rng).save("hat.png")
""",
        runs_commands=True,
        parsed=("generator directions", "generator train", "generator calibrate", "--each", "--from-adapter ann"),
        smaller={"Refine(steps=25": "Refine(steps=2"},
    ),
    "docs/difflora_zoo.md": Page(
        """
from types import SimpleNamespace
from tests.difflora import helpers
from smidgen.difflora.zoo.records import pack_group
made = helpers.zoo("zoo")
names = [helpers.record(f"test-0000{n}", split="test") for n in (2, 3)]
made.commit(pack_group(made.layout, 3, helpers.numbers(2, made.layout.size, seed=9), names))
base = SimpleNamespace(unet=helpers.net())
""",
        smaller={"components=64": "components=2"},
    ),
    "docs/embedded_base.md": Page(),
    "docs/export.md": Page(
        PIPE
        + """
from smidgen import cli
assert cli.main(["sample", "--seeds", "3", "--no-sheet", "--out", "sampled"]) == 0
smidgen.load(unet, "sampled")
import shutil
shutil.copytree("sampled", "my-adapter")
""",
        runs_commands=True,
        parsed=("my-oft",),
    ),
    "docs/extract.md": Page(
        """
import copy, torch, smidgen
base = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
finetuned = copy.deepcopy(base)
finetuned[0].weight.data += torch.outer(torch.linspace(-1, 1, 16), torch.linspace(1, 2, 16))
""",
    ),
    "docs/files.md": Page(PIPE),
    "docs/flux2.md": Page(
        runs_commands=True,
        parsed=("black-forest-labs", "generate me"),
        smaller={"--rank full --out drawn": f"--rank full {SHORT} --out drawn"},
    ),
    "docs/methods.md": Page(
        """
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=2, **small))
llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **small))
""",
    ),
    "docs/packaged.md": Page(slow=True),
    "docs/personalize.md": Page(
        PERSON
        + """
import shutil
from PIL import Image
from pathlib import Path
from dataclasses import replace
from smidgen.bases.families import load_base
from smidgen.tasks.personalize.settings import PRESETS, Data
my_judge = load_base("embedded").judge()
config = replace(PRESETS["debug"], data=Data(Path("pictures")), base="embedded", out=Path("judged"))
shutil.copy("pictures/001.png", "photo.png")
""",
        slow=True,
        runs_commands=True,
        parsed=("/models/", "--resume-from-checkpoint"),
        smaller={
            "--method svfit --out me\n": f"--method svfit {SHORT} --out me\n",
            "--max-train-steps 50 --out ann-trained": f"{SHORT} --out ann-trained",
            'rank="full"), out=Path("me"))': 'rank="full"), out=Path("full"), train=PRESETS["debug"].train, show=PRESETS["debug"].show)',
        },
        reads=(
            """
import shutil
from pathlib import Path
from PIL import Image
from smidgen import cli
from smidgen.tasks.personalize.settings import Data
from smidgen.tasks.personalize.subjects import read_subjects
for name, color in (("ann", "red"), ("bob", "blue"), ("bob_masks", "white")):
    (Path("two") / name).mkdir(parents=True)
    Image.new("RGB", (64, 64), color).save(Path("two") / name / "1.png")
Path("two/ann/1.txt").write_text("a portrait of a person")
Path("two/people.yaml").write_text(text)
found = read_subjects(Data(subjects=Path("two/people.yaml")), 64, 8)
assert [one.phrase for one in found.subjects] == ["sks person", "ohwx person"]
""",
        ),
    ),
    "docs/sdxl.md": Page(parsed=("stabilityai", "generate me")),
    "docs/serving.md": Page(
        PIPE
        + """
import json
from pathlib import Path
from smidgen import testing
from smidgen.bases.transformers import AUTO, Head, load_classifier
from tests.serving import helpers
for seed, name in enumerate(("ann", "team/bob", "style")):
    helpers.chat_adapter(Path("adapters") / name, "svfit", seed)
found = load_classifier(AUTO["text-classification"], "debug-chat", Head(("bad", "good")), 0, "no", None)
own = smidgen.config("svfit", modules_to_save=list(found.heads), labels=["bad", "good"], task_type="SEQ_CLS")
testing.perturb(smidgen.adapt(found.model, own))
smidgen.save(found.model, "adapters/mood")
Path("adapters/mood/report.json").write_text(json.dumps({"kind": "text-classification", "labels": ["bad", "good"]}))
smidgen.adapt(pipe, "svfit")
testing.perturb(pipe.unet)
smidgen.save(pipe, "adapters/cat")
Path("adapters/cat/report.json").write_text(json.dumps({"base": "embedded"}))
"""
        + SERVER,
        smaller={
            "smollm2": "debug-chat",
            'base_url="http://127.0.0.1:8000/v1"': "base_url=served()",
            '"steps": 20': '"steps": 2',
        },
        needs={
            "openai": ("openai", "fastapi", "prometheus_client"),
            "smidgen.serving.ray": ("ray", "fastapi", "prometheus_client"),
        },
    ),
    "docs/train.md": Page(
        before="""
from pathlib import Path
from smidgen.bases.packaged.debug import sentences
rows = "".join(f"{text},{label}\\n" for text, label in sentences())
Path("more.csv").write_text("text,label\\n" + rows)
Path("tweets.csv").write_text("text\\nwhat a day\\n")
""",
        slow=True,
        runs_commands=True,
        apart=True,
        parsed=("4.attention.self.value",),  # six thousand tweets in six layers
        smaller={
            "text-classification tweets --model minilm": "text-classification debug-text --model debug-text --max-length 32",
            "emoji --model vit-s14 --resolution 70": "debug-image --model debug-image",
            "wordnet --model smollm2 --max-length 128": "debug-chat --model debug-chat --max-length 48",
            'in one sentence."': 'in one sentence." --prompt "What is a dog?" --max-new-tokens 8',
            "--num-train-epochs 3 --learning-rate": "--num-train-epochs 1 --max-length 32 --no-load-best --learning-rate",
            'TextData("tweets"), adapter=Adapter("loldu"), out=Path("mood"))': (
                'TextData("debug-text", max_length=32), model="debug-text", adapter=Adapter("loldu"), out=Path("mood-3"))'
            ),
        },
    ),
    "docs/tutorial.md": Page(slow=True, runs_commands=True, smaller={". .venv/bin/activate": "true"}),
    "docs/ui.md": Page(needs={"fastapi": ("fastapi", "gradio")}),
    "docs/verify.md": Page(
        CHAT
        + """
from types import MethodType
model = reader()
smidgen.save(trained(reader(), target_modules=["query", "value"]), "my-adapter")
smidgen.save(trained(reader(), target_modules=["query", "value"]), "other")
folder, tokens, x = "my-adapter", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3]])
mask = torch.ones_like(tokens)
model.encode = lambda x: x
model.decode = lambda x: model(x).logits
""",
        reads=(
            """
import re
first = lambda table: [re.split(r" {2,}", line.strip())[0] for line in table.splitlines()]
assert set(first(text)) <= {*first(str(report)), "dense"}, str(report)
""",
        ),
    ),
}
