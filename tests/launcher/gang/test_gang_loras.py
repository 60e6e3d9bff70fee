"""LoRAs of a gang: names with scales, checked before any rank is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load

from helpers.models.lora import loras_of
from xdit_core import Engine, ModelError, UsageError
from xdit_core.planning.planner import make_plan
from xdit_core.testing.runs import generate
from xdit_launcher import Gang
from xdit_launcher.gang.batch import kind_of
from xdit_launcher.gang.gang import Answer
from xdit_launcher.gang.job import GangRequest, Job, RequestFailed
from xdit_launcher.gang.loras import AllowedLoras, LoraFile, checked

LATENT = {"output_type": "latent", "height": 24, "width": 40, "steps": 4}


@pytest.fixture(scope="module")
def paths(tiny_sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return loras_of(tiny_sd3_folder, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def values(tiny_sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, runs = str(tiny_sd3_folder), str(tmp_path_factory.mktemp("runs"))
    return {"model": "sd3", "model.path": folder, "max_sequence_length": 5, "device": "cpu", "threads": 1, "runs": runs}


@pytest.fixture(scope="module")
def plan(values: dict[str, Any]) -> Any:
    return make_plan([], values)


@pytest.fixture(scope="module")
def gang(values: dict[str, Any], paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Two ranks, which have one LoRA for every picture, and one for those who ask for it; and a file that is none."""
    bad = tmp_path_factory.mktemp("bad") / "bad.bin"
    bad.write_bytes(b"nothing")
    loras = {"ink": paths[0], "bad": str(bad)}
    with Gang(["tp"], {**values, "tp.degree": 2, "lora": f"{paths[1]}:0.5"}, loras=loras) as started:
        yield started


def latents(gang: Gang, **settings: Any) -> Any:
    return load(gang.generate("a red fox", **LATENT, **settings).latents or b"")["latents"]


def test_requests_change_what_the_ranks_have_in_their_weights(
    gang: Gang, gloo: Any, paths: list[str], tiny_sd3_folder: Path
) -> None:
    plain, both = latents(gang), latents(gang, lora={"ink": -1.5})
    with pytest.raises(RequestFailed, match="lora=bad cannot be read as a LoRA") as caught:
        latents(gang, lora="bad")
    assert "/" not in str(caught.value)
    assert np.array_equal(latents(gang, lora="ink:-1.5"), both)
    for lora in ({}, None, {"ink": 0}, "ink:0"):
        assert np.array_equal(latents(gang, lora=lora), plain)
    fresh = {**LATENT, "tp.degree": 2, "lora": (f"{paths[1]}:0.5", f"{paths[0]}:-1.5")}
    want = gloo.run(generate, ["tp"], str(tiny_sd3_folder), fresh, world=2)[0][0]
    assert np.array_equal(both, want.numpy()) and not np.array_equal(both, plain)


WRONG = [
    ("wash", "there is no LoRA 'wash'; known are bad, ink."),
    ({"/etc/passwd": 1}, "there is no LoRA '/etc/passwd'; known are bad, ink."),
    ("https://example.com/x.safetensors", "there is no LoRA 'https'; known are"),
    ("../ink:0.5", "there is no LoRA '../ink'"),
    ("ink:0.5,ink:1", "ink is given twice"),
    *(
        (f"ink:{scale}", "lora: ink has the scale .*; give a number from -100 to 100")
        for scale in ("nan", "inf", "1e9")
    ),
    *(({"ink": scale}, "lora: ink has the scale") for scale in ("0.5", True, None, [[]], float("nan"), 10**400)),
    ("ink:", "lora: ink has the scale"),
    (["ink"], "lora has names with scales"),
    (1, "lora has names with scales"),
]


@pytest.mark.parametrize(("lora", "sentence"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_refused_at_once(gang: Gang, lora: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        gang.submit("a red fox", lora=lora)


def test_without_a_list_nothing_is_allowed() -> None:
    with pytest.raises(UsageError, match="there is no LoRA 'ink'; none is allowed here; leave lora out"):
        AllowedLoras().scales("ink")
    assert AllowedLoras().scales({}) == AllowedLoras().scales("") == {}


def test_requests_with_other_loras_are_not_drawn_together() -> None:
    allowed = AllowedLoras({"ink": "/a", "wash": "/b"})

    def kind(lora: Any) -> str:
        return kind_of(Job("1", GangRequest(("x",), {"seed": [1], "lora": allowed.texts(lora)}), (1,)))

    assert kind("ink:0.5,wash") == kind({"wash": 1, "ink": 0.5})
    assert len({kind(lora) for lora in ("ink", "ink:0.5", "wash", "ink,wash", "")}) == 5


def test_errors_of_ranks_name_no_path() -> None:
    from xdit_launcher.gang.batch import Batch

    job = Job("1", GangRequest(("x",), {}), (0,))
    answer = Answer(Batch([job]), 1, AllowedLoras({"ink": "/srv/a", "wash": "/srv/a/b"}))
    answer.take(0, {"event": "end", "outcome": "failed", "error": "lora=/srv/a/b, /srv/a is cut off", "refused": False})
    answer.finish()
    with pytest.raises(RequestFailed, match=r"^lora=wash, ink is cut off$"):
        job.result()


def write(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def test_a_file_of_loras(plan: Any, paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "near").symlink_to(paths[1])
    file = tmp_path / "loras.txt"
    allowed = LoraFile(write(file, f"# styles\nink = {paths[0]}\n\n wash=near\n"), plan)
    assert dict(allowed) == {"ink": paths[0], "wash": str(tmp_path / "near")}
    assert allowed.texts("wash:2,ink") == [f"{paths[0]}:1.0", f"{tmp_path}/near:2.0"]
    (tmp_path / "cut.safetensors").write_bytes(b"\x01")
    refused = {
        f"ink = {paths[0]}\nink = {paths[1]}": "names ink twice; write NAME = PATH or hub id on each line",
        "ink": "has the line 'ink'",
        f"a b = {paths[0]}": "'a b' is no name for a LoRA; use letters, digits",
        f"ink:2 = {paths[0]}": "'ink:2' is no name for a LoRA",
        "ink = nowhere": "ink: there is no file or folder nowhere",
        "ink =": "ink: there is no file or folder",
        "ink = ../a/b": "ink: there is no file or folder ../a/b",
        f"ink = {paths[0]}\npen = {paths[0]}": "pen and ink are the same file",
        "ink = cut.safetensors": "no safetensors header",
    }
    for text, sentence in refused.items():
        write(file, text)
        with pytest.raises((UsageError, ModelError), match=sentence):
            allowed.reload()
        assert len(allowed) == 2
    write(file, f"pen = {paths[0]}")
    assert allowed.reload() == 1 and list(allowed) == ["pen"]
    assert allowed.named(f"{tmp_path}/near is gone") == "wash is gone"  # a request with it may be drawn
    with pytest.raises(UsageError, match=r"--loras .*nowhere"):
        LoraFile(str(tmp_path / "nowhere"), plan)
    assert len(LoraFile(None, plan)) == LoraFile(None, plan).reload() == 0


def test_one_that_the_plan_has_already(values: dict[str, Any], paths: list[str]) -> None:
    with pytest.raises(UsageError, match="ink and lora= are the same file"):
        checked({"ink": paths[0]}, make_plan([], {**values, "lora": paths[0]}), "loras=")


def test_hub_ids_are_those_of_the_owner(
    plan: Any, paths: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def hf_hub_download(repo: str, file: str) -> str:
        asked.append((repo, file))
        if repo == "someone/none":
            raise OSError("no answer\nat all")
        (tmp_path / f"{len(asked)}.safetensors").symlink_to(Path(paths[0]) / "pytorch_lora_weights.safetensors")
        return str(tmp_path / f"{len(asked)}.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    made = checked({"ink": "someone/ink", "wash": "someone/two/wash.safetensors"}, plan, "loras=")
    assert asked == [("someone/ink", "pytorch_lora_weights.safetensors"), ("someone/two", "wash.safetensors")]
    assert [Path(path).name for path in made.values()] == ["1.safetensors", "2.safetensors"]
    with pytest.raises(ModelError, match=r"of someone/none \(OSError: no answer\); give a file"):
        checked({"ink": "someone/none"}, plan, "loras=")
    assert len(asked) == 3


def test_a_linked_file_keeps_its_suffix(tiny_sd3_folder: Path, paths: list[str], tmp_path: Path) -> None:
    """As in the cache of the hub, where names are links to files that are named by their digest."""
    (tmp_path / "blob").write_bytes((Path(paths[0]) / "pytorch_lora_weights.safetensors").read_bytes())
    (tmp_path / "ink.safetensors").symlink_to(tmp_path / "blob")
    words = {"model.path": str(tiny_sd3_folder), "max_sequence_length": 5, "device": "cpu", **LATENT}
    with Engine.from_pretrained("sd3", **words, lora={str(tmp_path / "ink.safetensors"): 0.5}) as engine:
        linked = engine.generate("a red fox").latents
        assert linked is not None and linked.equal(engine.generate("a red fox", lora=f"{paths[0]}:0.5").latents)
