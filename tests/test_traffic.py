from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.declare.traffic import Traffic, _draw, choose, choose_sticky, parse_traffic, shadows_for

KNOWN = ["a", "b", "c", "classifier"]
KEYS = [f"user-{number}" for number in range(10_000)]


def table(**weights: float) -> Traffic:
    return parse_traffic(weights, None, list(weights), "/predict")


def within_4_sigma(hits: int, share: float, n: int) -> bool:
    return abs(hits - n * share) <= 4 * math.sqrt(n * share * (1 - share))


def test_parse_sorts_by_name_and_makes_floats() -> None:
    traffic = parse_traffic({"c": 0, "b": 0.75, "a": 0.25}, {"c": 1, "b": 0.5}, KNOWN, "/predict")
    assert traffic.weights == (("a", 0.25), ("b", 0.75), ("c", 0.0))
    assert traffic.shadows == (("b", 0.5), ("c", 1.0))
    assert all(type(share) is float for _, share in traffic.weights + traffic.shadows)
    assert hash(traffic) == hash(parse_traffic({"a": 0.25, "b": 0.75, "c": 0}, {"b": 0.5, "c": 1}, KNOWN, ""))


def test_a_shadow_of_0_is_dropped_and_none_means_none() -> None:
    assert parse_traffic({"a": 1}, {"b": 0, "c": 0.0}, KNOWN, "/predict").shadows == ()
    assert parse_traffic({"a": 1}, None, KNOWN, "/predict").shadows == ()


def test_a_backend_may_be_its_own_shadow() -> None:
    assert parse_traffic({"a": 1}, {"a": 0.5}, KNOWN, "/predict").shadows == (("a", 0.5),)


@pytest.mark.parametrize("n", [3, 6, 7, 49])
def test_rounding_in_the_sum_is_forgiven(n: int) -> None:
    names = [f"v{number}" for number in range(n)]
    assert len(parse_traffic(dict.fromkeys(names, 1 / n), None, names, "/predict").weights) == n


@pytest.mark.parametrize(
    ("weights", "shadows", "error", "text"),
    [
        ({}, None, ValueError, "/predict: no backend in the traffic"),
        ({"a": 0.5, "b": 0.6}, None, ValueError, r"sum to 1, got 1.1 \(0.5 for 'a' \+ 0.6 for 'b'\)"),
        ({"a": 0.33, "b": 0.33, "c": 0.33}, None, ValueError, "got 0.99 "),
        ({"a": 60, "b": 40}, None, ValueError, "got 100 "),
        ({"a": 0}, None, ValueError, "got 0 "),
        ({"a": 1e308, "b": 1e308}, None, ValueError, "got inf "),
        ({"a": 1.5, "b": -0.5}, None, ValueError, "the weight of 'b' must be ≥ 0 and finite, got -0.5"),
        ({"a": math.nan}, None, ValueError, "finite, got nan"),
        ({"a": math.inf}, None, ValueError, "finite, got inf"),
        ({"a": 10**400}, None, ValueError, "finite, got inf"),
        ({"a": True}, None, TypeError, "the weight of 'a' must be a number, got True"),
        ({"a": "1"}, None, TypeError, "must be a number, got '1'"),
        ({"a": None}, None, TypeError, "must be a number, got None"),
        ({3: 1.0}, None, TypeError, "the backend's name, a str, got 3"),
        ("a", None, TypeError, "weights must be a dict of numbers by backend, got 'a'"),
        ({"clasifier": 1}, None, ValueError, "unknown backend 'clasifier': did you mean 'classifier'?"),
        ({"a": 1}, {"zzz": 0.5}, ValueError, "unknown backend 'zzz': there is 'a', 'b'"),
        ({"a": 1}, {"b": 1.01}, ValueError, r"the shadow of 'b' must be in \[0, 1\], got 1.01"),
        ({"a": 1}, {"b": -0.1}, ValueError, "the shadow of 'b' must be ≥ 0"),
        ({"a": 1}, {"b": False}, TypeError, "the shadow of 'b' must be a number"),
        ({"a": 1}, [("b", 0.1)], TypeError, "shadows must be a dict"),
    ],
)
def test_what_parse_refuses(weights: Any, shadows: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        parse_traffic(weights, shadows, KNOWN, "/predict")
    assert str(caught.value).startswith("/predict: ")


def test_the_record_is_frozen_and_survives_msgpack() -> None:
    traffic = parse_traffic({"a": 0.5, "b": 0.5}, {"c": 0.1}, KNOWN, "/predict")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(traffic), type=Traffic) == traffic
    with pytest.raises(AttributeError):
        traffic.weights = ()  # type: ignore[misc]


def test_choose_by_cumulative_weight() -> None:
    traffic = table(a=0.25, b=0.5, c=0.25)
    assert [choose(traffic, x) for x in (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999)] == list("aabbcc")
    assert choose(table(a=1), 0.999) == "a"


def test_choose_never_takes_a_weight_of_0() -> None:
    traffic = table(a=0, b=0.5, c=0, d=0.5, e=0)
    below_1 = math.nextafter(1, 0)
    assert [choose(traffic, x) for x in (0.0, 0.5, below_1)] == ["b", "d", "d"]


def test_choose_when_the_sum_is_a_little_less_than_1() -> None:
    assert choose(table(a=0.5, b=0.5 - 1e-8, c=0), math.nextafter(1, 0)) == "b"


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=8).filter(any),
    st.floats(0, 1, exclude_max=True),
    st.text(),
)
def test_every_choice_has_a_weight(parts: list[int], uniform: float, key: str) -> None:
    weights = {f"v{number}": part / sum(parts) for number, part in enumerate(parts)}
    traffic = table(**weights)
    assert weights[choose(traffic, uniform)] > 0
    assert weights[choose_sticky(traffic, key)] > 0


def test_random_shares_follow_the_weights() -> None:
    uniform = random.Random(7)
    weights = {"a": 0.1, "b": 0.2, "c": 0.7}
    counts = Counter(choose(table(**weights), uniform.random()) for _ in range(10_000))
    assert all(within_4_sigma(counts[name], share, 10_000) for name, share in weights.items())


def test_sticky_golden_values() -> None:
    """If this fails, users' keys would move to other backends on upgrade: change the code back."""
    traffic = table(v1=0.5, v2=0.3, v3=0.2)
    keys = ["", "u1", "u2", "u3", "u4", "u5", "u6", "u7", "héllo", "日本", "x" * 1000, "\udcff"]
    chosen = [choose_sticky(traffic, key) for key in keys]
    assert chosen == ["v3", "v2", "v1", "v1", "v1", "v2", "v2", "v3", "v3", "v3", "v1", "v1"]


@pytest.mark.parametrize(
    "weights",
    [{"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 0.99, "b": 0.01}, {"a": 1.0, "b": 0.0}],
)
def test_sticky_shares_follow_the_weights(weights: dict[str, float]) -> None:
    traffic = table(**weights)
    counts = Counter(choose_sticky(traffic, key) for key in KEYS)
    assert all(within_4_sigma(counts[name], share, len(KEYS)) for name, share in weights.items())


def test_sticky_with_one_backend() -> None:
    assert choose_sticky(table(a=1), "anyone") == "a"


def test_a_change_of_weights_moves_few_keys_and_only_to_the_grown_backend() -> None:
    before, after = table(a=0.5, b=0.5), table(a=0.6, b=0.4)
    moved = [key for key in KEYS if choose_sticky(before, key) != choose_sticky(after, key)]
    assert 0.085 * len(KEYS) <= len(moved) <= 0.115 * len(KEYS)
    assert {choose_sticky(after, key) for key in moved} == {"a"}


def least_moved(before: Traffic, after: Traffic) -> float:
    """The share of the keys that no way of choosing could leave where they are."""
    shares = dict(after.weights)
    return sum(max(0.0, share - shares.get(name, 0.0)) for name, share in before.weights)


@pytest.mark.parametrize("count", [5, 20])
def test_any_number_of_backends(count: int) -> None:
    keys = KEYS[:3000]
    uniform = random.Random(count)

    def some() -> Traffic:
        parts = [uniform.randint(1, 9) for _ in range(count)]
        return table(**{f"v{number}": part / sum(parts) for number, part in enumerate(parts)})

    before = some()
    counts = Counter(choose_sticky(before, key) for key in keys)
    assert all(within_4_sigma(counts[name], share, len(keys)) for name, share in before.weights)
    for _ in range(3):
        after = some()
        least = least_moved(before, after)
        moved = sum(choose_sticky(before, key) != choose_sticky(after, key) for key in keys)
        assert least * len(keys) * 0.8 <= moved <= 2 * least / (1 + least) * len(keys) * 1.2


@pytest.mark.parametrize("count", [5, 20])
def test_what_grows_among_many_takes_no_more_keys_than_it_must(count: int) -> None:
    names = [f"v{number}" for number in range(count)]
    before = table(**dict.fromkeys(names, 1 / count))
    after = table(**{**dict.fromkeys(names, 0.6 / (count - 1)), "v0": 0.4})
    moved = [key for key in KEYS if choose_sticky(before, key) != choose_sticky(after, key)]
    assert within_4_sigma(len(moved), least_moved(before, after), len(KEYS))
    assert {choose_sticky(after, key) for key in moved} == {"v0"}


def test_a_new_backend_takes_its_share_and_moves_nothing_between_the_others() -> None:
    before, after = table(a=0.5, b=0.5), table(a=0.4, b=0.4, c=0.2)
    moved = [key for key in KEYS if choose_sticky(before, key) != choose_sticky(after, key)]
    assert within_4_sigma(len(moved), 0.2, len(KEYS))
    assert {choose_sticky(after, key) for key in moved} == {"c"}


def test_sticky_choices_do_not_depend_on_the_order_of_the_table() -> None:
    forward = Traffic((("a", 0.3), ("b", 0.3), ("c", 0.4)))
    backward = Traffic(forward.weights[::-1])
    assert all(choose_sticky(forward, key) == choose_sticky(backward, key) for key in KEYS[:1000])


def test_ten_thousand_keys_keep_their_backend_in_another_process() -> None:
    script = (
        "from serveit.declare.traffic import Traffic, choose_sticky\n"
        "traffic = Traffic((('a', .3), ('b', .3), ('c', .4)))\n"
        "import sys; sys.stdout.write(''.join(choose_sticky(traffic, f'user-{n}') for n in range(10_000)))"
    )
    traffic = table(a=0.3, b=0.3, c=0.4)
    here = "".join(choose_sticky(traffic, key) for key in KEYS)
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout == here
    assert set(here) == set("abc")


def test_the_border_between_name_and_key_counts() -> None:
    assert _draw("ab", "c") != _draw("a", "bc")


@given(st.text(), st.text(st.characters()))
def test_a_draw_is_between_0_and_1(name: str, key: str) -> None:
    assert 0 < _draw(name, key) < 1


def test_each_shadow_is_drawn_on_its_own() -> None:
    traffic = parse_traffic({"a": 1}, {"a": 0.5, "b": 0.5, "c": 1}, KNOWN, "/predict")
    for draws, expected in (
        ([0.4, 0.6, 0.99], ["a", "c"]),
        ([0.6, 0.4, 0.99], ["b", "c"]),
        ([0.5, 0.5, 0.0], ["c"]),
        ([0.0, 0.0, 0.0], ["a", "b", "c"]),
    ):
        assert shadows_for(traffic, iter(draws).__next__) == expected


def test_without_shadows_nothing_is_drawn() -> None:
    assert shadows_for(table(a=1), iter(()).__next__) == []
