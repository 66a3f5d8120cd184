"""Published names <-> ours: lossless both ways, with the prefixes and spellings found in the wild."""

import pytest
import torch

from models import StripMLPNet, from_published, to_published
from models.checkpoint_compat import is_published
from tests.golden.load import arguments, filled, variants


@pytest.mark.parametrize("variant", sorted(variants()))
def test_round_trip(variant: str) -> None:
    published = dict.fromkeys(variants()[variant]["state_dict"])
    ours = from_published(published)
    assert len(ours) == len(published)
    assert not set(ours) & {name for name in published if name.startswith(("blocks", "merging", "conv_"))}
    assert to_published(ours) == published
    assert list(to_published(ours)) == list(published)


def test_values_are_the_same_objects() -> None:
    published = filled("nano32")
    ours = from_published(published)
    assert {id(value) for value in ours.values()} == {id(value) for value in published.values()}
    model = StripMLPNet(**arguments("nano32"))
    assert model.load_state_dict(ours, strict=True)
    for name, value in to_published(model.state_dict()).items():
        assert torch.equal(value, published[name]), name


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."))
def test_prefixes(prefix: str) -> None:
    published = dict.fromkeys(variants()["nano32"]["state_dict"])
    wrapped = {prefix + name: value for name, value in published.items()}
    assert from_published(wrapped) == from_published(published)
    assert is_published(wrapped)
    ours = {prefix + name: value for name, value in from_published(published).items()}
    assert not is_published(ours)
    assert to_published(ours) == published


def test_proh_w_spelling() -> None:
    published = dict.fromkeys(variants()["nano32"]["state_dict"])
    misspelt = {name.replace("proj_w", "proh_w"): value for name, value in published.items()}
    assert misspelt != published
    assert from_published(misspelt) == from_published(published)


def test_ours_and_unknown_names_pass_through() -> None:
    ours = from_published(dict.fromkeys(variants()["nano32"]["state_dict"]))
    assert from_published(ours) == ours
    assert from_published({"blocks1.0.token_mixing.extra": 1, "fc.weight": 2}) == {
        "blocks1.0.token_mixing.extra": 1,
        "fc.weight": 2,
    }


def test_errors() -> None:
    with pytest.raises(KeyError, match="fc.weight"):
        to_published({"fc.weight": 1})
    stem = "token_mixing.smlp_block"
    with pytest.raises(ValueError, match="two keys .* the second is 'blocks1.0.token_mixing.smlp_block.proh_w.weight'"):
        from_published({f"blocks1.0.{stem}.proj_w.weight": 1, f"blocks1.0.{stem}.proh_w.weight": 2})


def test_prefixes_inside_names_and_of_some_names_stay() -> None:
    names = dict.fromkeys(("stages.0.mixer.module.0.weight", "module.head.weight", "head.weight"))
    assert from_published(names) == names
