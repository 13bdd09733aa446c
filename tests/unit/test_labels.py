"""Labels of models and tenants: known names only, never too many of them, never a key."""

import pytest

from microbatch.accounting.labels import (
    MOST_MODELS,
    MOST_PAIRS,
    MOST_TENANTS,
    NO_MODEL,
    NO_TENANT,
    OTHER_MODELS,
    OTHER_TENANTS,
    CallerLabels,
    model_name,
    tenant_name,
)

DIGEST = "0123456789abcdef" * 4


def test_what_has_no_name_has_a_label_all_the_same():
    assert CallerLabels().pair(None, None, answered=True) == (NO_MODEL, NO_TENANT)
    assert CallerLabels().pair("", "", answered=True) == (NO_MODEL, NO_TENANT)
    assert CallerLabels().pair(None, None, answered=False) == (NO_MODEL, NO_TENANT)


def test_a_name_becomes_a_label_with_the_first_answer():
    labels = CallerLabels()
    assert labels.pair("m", "t", answered=False) == (OTHER_MODELS, OTHER_TENANTS)
    assert labels.pair("m", "t", answered=True) == ("m", "t")
    assert labels.pair("m", "t", answered=False) == ("m", "t")


def test_names_that_are_never_answered_take_no_places():
    labels = CallerLabels()
    for number in range(1_000):
        labels.pair(f"model {number}", f"tenant {number}", answered=False)
    assert labels.pair("m", "t", answered=True) == ("m", "t")


def test_beyond_the_limit_names_count_together_and_known_ones_stay():
    labels = CallerLabels()
    assert {labels.model(f"m{number}", answered=True) for number in range(MOST_MODELS)} == {
        f"m{number}" for number in range(MOST_MODELS)
    }
    assert labels.model("one more", answered=True) == OTHER_MODELS
    assert labels.model("m0", answered=True) == "m0"
    for number in range(MOST_TENANTS):
        labels.tenant(f"t{number}", answered=True)
    assert labels.tenant("one more", answered=True) == OTHER_TENANTS


def test_pairs_are_bounded_too():
    labels = CallerLabels()
    pairs = {labels.pair(f"m{one}", f"t{two}", answered=True) for one in range(100) for two in range(100)}
    assert len(pairs) <= MOST_PAIRS + MOST_MODELS + 1
    assert ("m0", "t0") in pairs
    assert labels.pair("m63", "t63", answered=True) == ("m63", OTHER_TENANTS)


@pytest.mark.parametrize(
    "name", ["sk-abcdefghijkl", "Bearer abcdefgh", "m sk-proj-abcdefgh", "gsk-0123456789", "\nkey-abcdefghijk\n"]
)
def test_what_looks_like_a_key_is_no_name(name):
    for shown in (model_name(name), tenant_name(name)):
        assert "***" in shown
        assert "abcdefgh" not in shown
        assert "0123456789" not in shown


def test_names_are_one_short_line_of_valid_text():
    assert model_name("a\nb\tc") == "a b c"
    assert len(model_name("x" * 10_000)) == 80
    assert len(tenant_name("x" * 10_000)) == 80
    model_name("\ud800").encode()


def test_of_a_digest_the_first_digits_are_shown():
    assert tenant_name(DIGEST) == DIGEST[:12]
    assert tenant_name(DIGEST[:-1]) == DIGEST[:-1]
