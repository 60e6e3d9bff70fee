"""Several pictures of one call, each with a text, a seed and a negative prompt of its own: each as if it were alone."""

from __future__ import annotations

import pytest

from helpers.models.families import FAMILIES, settings
from helpers.models.tiny import saved
from xdit_core import Engine, UsageError
from xdit_core.testing import assert_close
from xdit_core.testing.runs import generate, plan_for

OTHERS = {"dit": ("1", "3"), "prompt": ("a green frog in the rain", "snow")}


def latents_of(plugins, folder, values, texts, negative=None, **changes):
    """Latents of a list of texts, on every rank."""
    changes |= {"negative": negative} if negative else {}
    engine = Engine(plan_for(plugins, folder, values))
    try:
        return engine.generate_all([texts], **changes)[0].latents
    finally:
        engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_is_as_if_it_were_alone(gloo, tmp_path_factory, name):
    family = FAMILIES[name]
    folder = saved(family.model, tmp_path_factory.mktemp("texts") / name, **family.options)
    others = OTHERS["dit" if family.model == "dit" else "prompt"]
    texts, seeds = [family.subject, *others], [5, 3, 8]
    values = settings(family, images=1)
    together = latents_of([], folder, values, texts, seed=seeds)
    for text, seed, latents in zip(texts, seeds, together, strict=True):
        assert_close(latents[None], generate([], folder, values, text, {"seed": seed})[0])
    for latents in gloo.run(latents_of, ["dp"], folder, {**values, "seed": tuple(seeds)}, texts, world=2):
        assert_close(latents, together)


def test_with_strategies_and_negatives(gloo, tmp_path):
    folder, values = saved("sd3", tmp_path / "sd3"), {"steps": 4}
    texts, negatives = ["a red fox", "a frog"], ["rain", "snow and ice"]
    plugins = ["cfg", "usp"]
    found = gloo.run(latents_of, plugins, folder, {**values, "seed": (5, 9)}, texts, negatives, world=4)
    for i, (text, negative, seed) in enumerate(zip(texts, negatives, (5, 9), strict=True)):
        alone = generate([], folder, values, text, {"seed": seed, "negative": negative})[0]
        for latents in found:
            assert_close(latents[i : i + 1], alone)


@pytest.mark.parametrize(
    ("prompts", "changes", "sentence"),
    [
        ([["a", "b"], "c"], {}, "one for each picture"),
        ([["a", "b"], ["c"]], {}, "one for each picture"),
        ([[]], {}, "one for each picture"),
        ([["a", " "]], {}, "no text"),
        ([["a", 3]], {}, "no text"),
        ([["a", "b"]], {"images": 3}, "2 texts for images=3"),
        ([["a", "b"]], {"seed": [1, 2, 3]}, "equally many"),
        ([["a", "b"]], {"negative": ["x"]}, "equally many"),
        ([["a", "b"]], {"negative": ["x", None]}, "no text"),
    ],
)
def test_what_is_refused(tmp_path_factory, prompts, changes, sentence):
    with Engine(plan_for([], saved("sd3", tmp_path_factory.mktemp("m") / "sd3"))) as engine:
        with pytest.raises(UsageError, match=sentence):
            engine.generate_all(prompts, **changes)
        assert engine.generate("a red fox").latents is not None


def test_the_bundled_model():
    """Its prompts are encoded by the adapter."""
    with Engine.from_pretrained("emoji", device="cpu", steps=3, output_type="latent") as engine:
        together = engine.generate_all([["red heart", "rocket"]], seed=[4, 9])[0].latents
        for i, (text, seed) in enumerate((("red heart", 4), ("rocket", 9))):
            assert_close(together[i : i + 1], engine.generate(text, seed=seed).latents)
