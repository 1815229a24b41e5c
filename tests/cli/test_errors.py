"""Bad input ends in one line on stderr that names the place and in a status other than 0; the disk stays as it was."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from unlearnjax import save_model
from unlearnjax.cli import commands
from unlearnjax.cli import main as module
from unlearnjax.cli.main import main
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import LanguageModel

ROW = {"id": "a1qa0", "input": "Who wrote it?", "output": "Marcile", "task": "Task1"}
DOCUMENT = {"id": "d1", "document": "Marcile wrote it."}
CONTEXT = 64
ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
# One letter and one space are two tokens of the tokenizer below.
LONG = "w " * (CONTEXT - 20)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    tokenizer = train_tokenizer(["Who wrote it? Marcile wrote it."], 280)
    tokenizer.model_max_length = 16  # shorter than the rows: transformers warns of such rows on stderr
    config = ModelConfig("olmo", len(tokenizer), 16, 24, 1, 2, 2, 8, "layer", max_positions=CONTEXT, eos_token_ids=(1,))
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(0))
    folder = tmp_path_factory.mktemp("model") / "base"
    save_model(LanguageModel(params, config, tokenizer, model, "base"), folder)
    return folder


class Job:
    """A folder in which everything is right; a test spoils one thing."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.out, self.model = folder, folder / "out", folder / "model"
        shutil.copytree(model, self.model)
        self.options = {"--model": self.model, "--out": self.out}
        for name in ("forget", "retain"):
            self.write(name, ROW)
        self.recipe(candidates=[{"name": "one", "rank": 2, "epochs": 1}], evaluation={"max_new_tokens": 8})

    def write(self, name, *rows):
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
        self.options[f"--{name}"] = path

    def recipe(self, **content):
        path = self.folder / "recipe.yml"
        path.write_text(json.dumps(content), "utf-8")  # JSON is YAML
        self.options["--recipe"] = path

    def config(self, **changes):
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    def command(self, name, *more):
        options = {k: v for k, v in self.options.items() if name == "run" or k != "--recipe"}
        return [name, "--quiet", *(str(x) for pair in options.items() for x in pair), *more]


@pytest.fixture
def job(tmp_path, model_folder):
    return Job(tmp_path, model_folder)


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch):
    """An error after the first training step or generated token is an error too late."""

    def never(*args, **keywords):
        raise AssertionError("computing began on bad input")

    for place in (
        "recipes.run.train_candidates", "recipes.run.open_keeper", "recipes.evaluate.model_fingerprint",
        "recipes.demo.teach",
    ):  # fmt: skip
        monkeypatch.setattr(f"unlearnjax.{place}", never)


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


def fails(capsys, folder, argv, *words):
    """Run; check status, the one line, and that nothing under `folder` changed."""
    before = listing(folder)
    status = main(argv)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert re.fullmatch(r"unlearnjax: error: [^\n]+\n", err), err
    for word in words:
        assert str(word) in err
    assert listing(folder) == before


def test_the_job_itself_is_right(job):
    """Else the tests below could fail for another reason than the one they spoil."""
    with pytest.raises(AssertionError, match="computing began"):
        main(job.command("run"))
    with pytest.raises(AssertionError, match="computing began"):
        main(job.command("evaluate", "--max-new-tokens", "8"))
    assert not job.out.exists()


# What is wrong with the data, for every command that reads it: (how to spoil it, words of the message).
def missing_file(job):
    job.options["--forget"] = job.folder / "nowhere.jsonl"


def broken_line(job):
    job.write("forget", ROW, '{"input": "Who?", "output": ')


def missing_column(job):
    job.write("retain", ROW, {"input": "Who?", "answer": "Marcile"})


def empty_set(job):
    job.write("retain")


def number_for_text(job):
    job.write("retain", ROW | {"output": 7})


def long_answer(job):
    job.write("forget", ROW, ROW | {"id": "long", "output": LONG})


def long_prompt(job):
    """It fits by itself, but not with the new tokens: 60 + 8."""
    job.write("retain", ROW, ROW | {"id": "long", "input": "w " * 30, "output": "w"})


def empty_prompt(job):
    job.write("retain", ROW, ROW | {"id": "empty", "input": ""})


def members_alone(job):
    job.write("members", DOCUMENT)


def nonmembers_alone(job):
    job.write("nonmembers", DOCUMENT)


def missing_members(job):
    job.write("nonmembers", DOCUMENT)
    job.options["--members"] = job.folder / "nowhere.jsonl"


def long_document(job):
    job.write("members", DOCUMENT)
    job.write("nonmembers", DOCUMENT, {"id": "long", "document": LONG})


def single_token(job):
    job.write("members", DOCUMENT)
    job.write("nonmembers", DOCUMENT, {"id": "short", "document": "w"})


def long_probe(job):
    """60 + 4 for the answer + 8 more; the official rows have room for 8 only."""
    job.write("probe", ROW | {"id": "long", "input": "w " * 29, "output": "w w "})


DATA = {
    missing_file: ("nowhere.jsonl", "no such file"),
    broken_line: ("forget.jsonl, line 2", "broken JSON"),
    missing_column: ("retain.jsonl, line 2", "no column 'output'", "answer"),
    empty_set: ("retain.jsonl", "no rows"),
    number_for_text: ("retain.jsonl, line 1", "'output' must be a string"),
    long_answer: ("forget.jsonl", "row 2 (id 'long')", str(CONTEXT)),
    long_prompt: ("retain.jsonl", "row 2 (id 'long')", "longer than the context", "60 tokens and 8 new ones"),
    empty_prompt: ("retain.jsonl", "row 2 (id 'empty')", "no tokens"),
    members_alone: ("--nonmembers", "missing"),
    nonmembers_alone: ("--members", "missing"),
    missing_members: ("nowhere.jsonl", "no such file"),
    long_document: ("nonmembers.jsonl", "document 2 (id 'long')", "longer than the context"),
    single_token: ("nonmembers.jsonl", "document 2 (id 'short')", "single token"),
    long_probe: ("probe.jsonl", "row 1 (id 'long')", "longer than the context"),
}


@pytest.mark.parametrize("command", ["run", "evaluate"])
@pytest.mark.parametrize("spoil", DATA, ids=lambda f: f.__name__)
def test_bad_data(job, capsys, monkeypatch, command, spoil):
    for place in ("run", "evaluate"):  # not even the weights are read
        monkeypatch.setattr(f"unlearnjax.recipes.{place}.load_params", None)
    spoil(job)
    fails(capsys, job.folder, job.command(command, *["--max-new-tokens", "8"] * (command == "evaluate")), *DATA[spoil])


# What is wrong with the model's folder.
def no_folder(job):
    job.options["--model"] = job.folder / "nowhere"


def no_config(job):
    (job.model / "config.json").unlink()


def unsupported(job):
    job.config(architectures=["MambaForCausalLM"], model_type="mamba")


def no_tokenizer(job):
    for path in job.model.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(job):
    (job.model / "tokenizer.json").write_text("{", "utf-8")


def pickled(job):
    (job.model / "model.safetensors").rename(job.model / "pytorch_model.bin")


def index_outside(job):
    (job.model / "model.safetensors").rename(job.folder / "elsewhere.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (job.model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def truncated(job):
    path = job.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_sizes(job):
    job.config(intermediate_size=32)


MODEL = {
    no_folder: ("nowhere", "no such folder"),
    no_config: ("config.json", "no such file"),
    unsupported: ("config.json", "MambaForCausalLM", "OlmoForCausalLM", "LlamaForCausalLM"),
    no_tokenizer: ("model", "tokenizer"),
    broken_tokenizer: ("model", "tokenizer cannot be loaded"),
    pickled: ("pytorch_model.bin", "from_pretrained", "save_pretrained"),
    index_outside: ("model.safetensors.index.json", "../elsewhere.safetensors", "inside the folder"),
    truncated: ("model.safetensors", "truncated"),
    other_sizes: ("model.safetensors", "shape"),
}


@pytest.mark.parametrize("command", ["run", "evaluate"])
@pytest.mark.parametrize("spoil", MODEL, ids=lambda f: f.__name__)
def test_bad_model(job, capsys, command, spoil):
    spoil(job)
    fails(capsys, job.folder, job.command(command, *["--max-new-tokens", "8"] * (command == "evaluate")), *MODEL[spoil])


TWO = [{"name": "one"}, {"name": "two"}]
TIES = {"method": "ties", "density": 0.5}
RECIPES = {
    "hyperparameter": ({"candidates": [{"learning_rat": 1}]}, "candidate", "'learning_rat'", "'learning_rate'"),
    "section": ({"candidates": TWO, "merge": []}, "'merge'", "'merges'"),
    "objective term": ({"candidates": [{"objective": {"nop": 1.0}}]}, "'nop'", "'npo'"),
    "merge method": ({"candidates": TWO, "merges": [{"method": "tise"}]}, "merge 1", "'tise'", "'ties'"),
    "merge hyperparameter": ({"candidates": TWO, "merges": [TIES | {"densty": 1}]}, "merge 1", "'densty'", "'density'"),
    "density missing": ({"candidates": TWO, "merges": [{"method": "ties"}]}, "merge 1", "needs density", "(0, 1]"),
    "density too large": ({"candidates": TWO, "merges": [TIES | {"density": 1.5}]}, "merge 1", "1.5", "(0, 1]"),
    "weights": ({"candidates": TWO, "merges": [TIES | {"weights": [1, 2, 3]}]}, "merge 1", "3 weights", "2 candidates"),
    "space": (
        {"candidates": TWO, "merges": [TIES | {"space": "factors", "semantics": "paper"}]},
        "merge 1", "factors", "peft",
    ),
    "linear": ({"candidates": TWO, "adapter": {"targets": ["q", "lm_head"]}}, "adapter", "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_bad_recipe(job, capsys, case):
    content, *words = RECIPES[case]
    job.recipe(**content)
    place = "recipe: adapter" if case == "linear" else job.options["--recipe"]
    fails(capsys, job.folder, job.command("run"), place, *words)


def test_broken_yaml_names_file_and_line(job, capsys):
    job.options["--recipe"].write_text("name: x\ncandidates:\n  - {name: one\nmerges: []\n", "utf-8")
    fails(capsys, job.folder, job.command("run"), "recipe.yml, line 4", "YAML")


def test_unknown_recipe_names_the_nearest(job, capsys):
    job.options["--recipe"] = "defalt"
    fails(capsys, job.folder, job.command("run"), "'defalt'", "'default'")
    job.options["--recipe"] = job.folder / "nowhere.yml"
    fails(capsys, job.folder, job.command("run"), "nowhere.yml", "no such recipe file")


@pytest.mark.parametrize("command", ["run", "evaluate", "demo"])
def test_out_is_taken(job, capsys, command):
    argv = job.command(command) if command != "demo" else ["demo", "--out", str(job.out)]
    job.out.write_text("mine", "utf-8")
    fails(capsys, job.folder, argv, job.out, "is a file")
    job.out.unlink()
    job.out.mkdir()
    (job.out / "mine").write_text("mine", "utf-8")
    fails(capsys, job.folder, argv, job.out, "not empty")
    argv[argv.index(str(job.out))] = str(job.out / "mine" / "below")
    fails(capsys, job.folder, argv, job.out / "mine", "is a file")


def test_out_of_a_run_and_resume(job, capsys):
    """An unfinished run asks for --resume; a finished one, or any other folder, is nothing to resume."""
    (job.out / "checkpoints").mkdir(parents=True)
    fails(capsys, job.folder, job.command("run"), job.out, "unfinished", "--resume")
    (job.out / "report.json").write_text("{}", "utf-8")
    fails(capsys, job.folder, job.command("run"), job.out, "not empty")
    (job.out / "checkpoints").rmdir()
    fails(capsys, job.folder, job.command("run", "--resume"), job.out, "has finished", "report.json")
    (job.out / "report.json").rename(job.out / "mine")
    fails(capsys, job.folder, job.command("run", "--resume"), job.out, "no unfinished run")


def test_out_of_a_demo_and_resume(job, capsys):
    argv = ["demo", "--out", str(job.out), "--recipe", str(job.options["--recipe"])]
    job.out.mkdir()
    (job.out / "mine").write_text("mine", "utf-8")
    fails(capsys, job.folder, [*argv, "--resume"], job.out, "not empty")
    (job.out / "demo.json").write_text('{"seed": 5}', "utf-8")
    fails(capsys, job.folder, argv, job.out, "unfinished", "--resume")
    fails(capsys, job.folder, [*argv, "--resume"], job.out, "seed was '5', is '0'")


@pytest.mark.parametrize("seconds", ["-1", "nan", "soon"])
def test_bad_interval(job, capsys, seconds):
    for argv in (job.command("run"), ["demo", "--out", str(job.out)]):
        fails(capsys, job.folder, [*argv, "--checkpoint-every", seconds], "checkpoint", seconds)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "--model", "m"], ("--forget", "required")),
        (["--versio"], ("--versio", "'--version'")),
        (["demo", "--outt", "x"], ("--outt", "'--out'", "unlearnjax demo --help")),
        (["demo", "--rec", "demo"], ("--rec", "'--recipe'")),
        (["demo", "more"], ("unknown argument 'more'",)),
        (["demo", "--seed", "one"], ("--seed", "one")),
        (["demo", "--seed", "-1"], ("--seed", "-1")),
        (["demo", "--recipe", "dmo"], ("'dmo'", "'demo'")),
        (["rnu"], ("rnu", "run")),
        (["score", "nowhere"], ("nowhere", "no such folder")),
        (["score"], ("folder", "required")),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_command_line(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    fails(capsys, tmp_path, argv, *words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-new-tokens", "0"], ("max_new_tokens", "0")),
        (["--batch-size", "-3"], ("batch_size", "-3")),
        (["--dtype", "float3"], ("'float3'", "'float32'")),
        (["--adapter", "nowhere"], ("nowhere", "no such folder")),
        (["--mmlu", "nowhere.json"], ("nowhere.json",)),
        (["--mmlu-data", "nowhere/at/all"], ("nowhere/at/all", "no such folder")),
        (["--recipe", "default"], ("--recipe",)),
    ],
    ids=lambda x: x[0],
)
def test_bad_options_of_evaluate(job, capsys, more, words):
    argv = job.command("evaluate", "--max-new-tokens", "8", *more)
    fails(capsys, job.folder, argv, *words)


def test_bad_dtype_of_run(job, capsys):
    fails(capsys, job.folder, job.command("run", "--dtype", "int8"), "'int8'", "float32")


def test_bad_mmlu_of_run(job, capsys):
    argv = job.command("run", "--mmlu-data", "nowhere/at/all")
    fails(capsys, job.folder, argv, "nowhere/at/all", "no such folder")
    fails(capsys, job.folder, [*argv, "--mmlu-shots", "-1"], "must not be negative")


@pytest.mark.parametrize(
    ("there", "more", "words"),
    [
        ("journal/x", [], ("an unfinished evaluation", "add --resume")),
        ("x", ["--resume"], ("no unfinished evaluation", "new folder")),
        ("scores.json", ["--resume"], ("has finished", "scores.json")),
    ],
    ids=["unfinished", "other files", "finished"],
)
def test_evaluate_takes_the_folder_of_its_own_evaluation(job, capsys, there, more, words):
    (job.out / there).parent.mkdir(parents=True)
    (job.out / there).write_text("x", "utf-8")
    fails(capsys, job.folder, job.command("evaluate", "--max-new-tokens", "8", *more), job.out, *words)


def test_demo_checks_the_recipe_against_its_model_first(job, capsys):
    job.recipe(candidates=TWO, evaluation={"max_new_tokens": 500})
    argv = ["demo", "--out", str(job.out), "--recipe", str(job.options["--recipe"])]
    fails(capsys, job.folder, argv, "forget: row", "500 new ones", "512")


def test_an_adapter_of_another_shape(job, capsys):
    """A LoRA for a wider model: named by its file, before the weights are read."""
    from unlearnjax.io.peft import save_adapter

    wide = ModelConfig("olmo", 280, 32, 24, 1, 2, 2, 16, "layer")
    lora = {"layers": {"attention": {"q": {"a": jnp.ones((1, 2, 32)), "b": jnp.ones((1, 32, 2))}}}}
    save_adapter(job.folder / "adapter", lora, config=wide, rank=2, alpha=2, base_model="x", targets=["q"])
    argv = job.command("evaluate", "--max-new-tokens", "8", "--adapter", str(job.folder / "adapter"))
    fails(capsys, job.folder, argv, "adapter_model.safetensors", "shape")


def test_one_line_in_a_process_of_its_own(job):
    """There, imports and the warnings of transformers (the tokenizer was told a shorter context) are on stderr too."""
    long_answer(job)
    before = listing(job.folder)
    argv = [sys.executable, "-m", "unlearnjax.cli.main", *job.command("run")]
    found = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": PATHS})
    assert found.returncode == 2 and found.stdout == ""
    assert re.fullmatch(r"unlearnjax: error: [^\n]+\n", found.stderr), found.stderr
    assert listing(job.folder) == before


def test_too_little_memory_is_told_and_is_no_lost_process(capsys, monkeypatch):
    def too_large(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes")

    left = []
    monkeypatch.setattr(module, "_main", too_large)
    monkeypatch.setattr(module, "leave", left.append)
    for several in (False, True):
        monkeypatch.setattr(module, "several", lambda several=several: several)
        assert main(["run"]) == 1
        said = capsys.readouterr().err
        assert "memory does not suffice" in said and "candidates_at_once" in said and "allocating 7" in said
    assert left == [1]


@pytest.mark.parametrize(("command", "refused"), [("merge", True), ("score", False)])
def test_commands_of_one_process_that_srun_started_several_times(command, refused, capsys, monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]"}.items():
        monkeypatch.setenv(name, value)
    assert main([command, "nothing"]) == 2
    said = capsys.readouterr().err
    assert ("is a command of one process, and srun started several; where each" in said) == refused


def test_the_base_is_bfloat16_but_on_cpus(monkeypatch):
    asked = module.parser().parse_args(["evaluate", "--model", "m", "--forget", "f", "--retain", "r", "--out", "o"])
    assert commands.dtype_of(asked) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert commands.dtype_of(asked) == "bfloat16"
    asked.dtype = "float16"
    assert commands.dtype_of(asked) == "float16"
