"""The search against brute force, on random spaces, losses and costs."""

import random
import time

import numpy as np
import pytest

from variant.models.config import VARConfig
from variant.models.flops import linear_flop
from variant.models.presets import VAR_PRESETS
from variant.search.costs import AdditiveCost, KVCost, latency_cost, work_cost
from variant.search.space import Space, default_depths, equidistant_sets, grid, nested_sets
from variant.search.tree import Found, front, search
from variant_kernels import DepthSchedule


def config_of(full_depth, patch_nums):
    return VARConfig(
        depth=full_depth, embed_dim=32, num_heads=2, num_classes=3, patch_nums=patch_nums,
        vocab_size=48, vae_channels=8,
    )  # fmt: skip


def random_problem(seed):
    """A space of up to 5 layers and 4 scales, its three costs, and a loss."""
    rng = random.Random(seed)
    full, scales = rng.randint(3, 6), rng.randint(2, 4)
    inner = range(1, full - 1)
    sets = [
        (0, *sorted(rng.sample(inner, rng.randint(0, len(inner)))), full - 1)
        for _ in range(rng.randint(2, 5))
    ]
    space = Space(full, scales, sets)
    config = config_of(full, sorted(rng.sample(range(1, 7), scales)))
    # Measured times need not rise with the depth.
    times = {depth: [rng.random() for _ in range(scales)] for depth in range(1, full + 1)}
    costs = [KVCost(space, config, 4), work_cost(space, config), latency_cost(space, times)]

    def loss(prefix):
        own = random.Random(f"{seed} {prefix}")
        # Deeper is mostly better.
        return [len(prefix) * (own.random() + 2 / len(prefix[-1])) for _ in range(3)]

    return space, costs, loss


def everything(space, costs, loss):
    """Every schedule with its loss and costs."""
    found = []
    for schedule in space.schedules():
        total = sum(float(np.mean(loss(schedule[:end]))) for end in range(1, len(schedule) + 1))
        found.append(Found(schedule, total, {cost.name: cost.of(schedule) for cost in costs}))
    return found


def curve(found, name):
    return [(one.costs[name], pytest.approx(one.loss)) for one in front(found, name)]


@pytest.mark.parametrize("seed", range(30))
def test_the_exact_search_finds_every_front_and_the_best_within_budgets(seed):
    space, costs, loss = random_problem(seed)
    known = everything(space, costs, loss)
    assert space.count()[0] == len(known) == len({one.schedule for one in known})
    result = search(space, costs, loss)
    assert result.exact
    for cost in costs:
        assert curve(result.found, cost.name) == curve(known, cost.name)
    rng = random.Random(seed)
    for name in ("kv", "work", "latency"):
        budgets = {name: rng.uniform(0.3, 1)}
        within = [one for one in known if one.costs[name] <= budgets[name]]
        best = search(space, costs, loss, budgets=budgets).best()
        if not within:
            assert best is None
            continue
        assert best.loss == pytest.approx(min(one.loss for one in within))
        assert result.best(budgets).loss == pytest.approx(best.loss)
    both = {"kv": 0.9, "work": 0.8}
    within = [one for one in known if all(one.costs[name] <= most for name, most in both.items())]
    best = search(space, costs, loss, budgets=both).best()
    assert (best is None) == (not within)
    assert best is None or best.loss == pytest.approx(min(one.loss for one in within))


@pytest.mark.parametrize("seed", range(30))
def test_no_bound_exceeds_the_cost_of_a_schedule(seed):
    space, costs, _ = random_problem(seed)
    for cost in costs:
        for schedule in space.schedules():
            for end in range(1, space.num_scales + 1):
                assert cost.bound(schedule[:end]) <= cost.of(schedule) + 1e-12


def test_the_bounds_cut_most_of_a_tree_whose_first_scales_decide():
    space = Space(8, 6, [(*range(n), 7) for n in range(1, 8)])
    costs = [work_cost(space, config_of(8, (1, 2, 3, 4, 6, 8)))]
    calls = []

    def loss(prefix):
        calls.append(prefix)
        return 0.0 if len(prefix) > 1 else float(8 - len(prefix[0]))

    assert search(space, costs, loss, budgets={"work": 0.3}).best().costs["work"] <= 0.3
    assert len(calls) < space.count()[1] / 3
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("seed", range(12))
def test_a_beam_that_holds_everything_is_exact_where_its_estimate_holds(seed):
    space, costs, _ = random_problem(seed)

    def loss(prefix):  # no scale loses less than with every layer
        own = random.Random(f"{seed} {prefix}")
        missing = space.full_depth - len(prefix[-1])
        return 1 + missing * own.random()

    result = search(space, costs, loss, exact=0, beam=10**6)
    assert not result.exact
    known = everything(space, costs, loss)
    for cost in costs:
        assert curve(result.found, cost.name) == curve(known, cost.name)


@pytest.mark.parametrize("seed", range(6))
def test_a_narrow_beam_keeps_the_seeds_and_the_budgets(seed):
    space, costs, loss = random_problem(seed)
    seeds = list(grid(space.full_depth, space.num_scales, space.sets).values())
    budgets = {"work": 0.8}
    result = search(space, costs, loss, budgets=budgets, seeds=seeds, exact=0, beam=1)
    found = {one.schedule: one for one in result.found}
    assert set(seeds) <= set(found)
    within = [found[s].loss for s in seeds if found[s].costs["work"] <= 0.8]
    best = result.best()
    assert best is None if not within else best.loss <= min(within)


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_gives_away_no_schedule_whose_loss_it_has_computed(seed):
    """Not even where more whole schedules are on a front than the beam is wide."""
    space, costs, loss = random_problem(seed)
    asked = []

    def recorded(prefix):
        asked.append(prefix)
        return loss(prefix)

    result = search(space, costs, recorded, exact=0, beam=1)
    whole = {prefix for prefix in asked if len(prefix) == space.num_scales}
    known = [one for one in everything(space, costs, loss) if one.schedule in whole]
    for cost in costs:
        assert curve(result.found, cost.name) == curve(known, cost.name)


def test_at_d30_and_ten_scales_it_ends_within_a_minute():
    config = VAR_PRESETS["var-d30"]
    depths = default_depths(config.depth, (16, 8, 4, 2))
    rng = random.Random(0)
    weight = [rng.uniform(0.5, 2) for _ in range(config.depth)]
    counted = []

    def loss(prefix):  # every layer helps, by its weight, and by the tokens of the scale
        counted.append(prefix)
        missing = sum(weight) - sum(weight[layer] for layer in prefix[-1])
        return (1 + missing / 60) * config.layout.tokens[len(prefix) - 1] / 680

    started = time.monotonic()

    def of_set(layers):
        every = tuple(range(30))
        schedule = (every,) * 6 + (layers,) * 4
        return sum(loss(schedule[:end]) for end in range(7, 11))

    sets = nested_sets(config.depth, depths, weight, of_set)
    assert [len(layers) for layers in sets] == list(depths)
    space = Space(config.depth, 10, [*sets, *equidistant_sets(config.depth, (16, 8, 4, 2))])
    costs = [KVCost(space, config), work_cost(space, config)]
    seeds = list(grid(config.depth, 10, equidistant_sets(config.depth, (16, 8, 4, 2))).values())
    result = search(space, costs, loss, budgets={"kv": 0.5}, seeds=seeds)
    assert time.monotonic() - started < 60
    assert not result.exact
    best, of_grid = result.best(), [one for one in result.found if one.schedule in set(seeds)]
    within = [one.loss for one in of_grid if one.costs["kv"] <= 0.5]
    assert best.loss < min(within)  # the layers of most weight first
    assert best.costs["kv"] <= 0.5


def test_work_is_that_of_the_flop_count():
    space = Space(8, 3, [(0, 7), (0, 3, 7)])
    config = config_of(8, (1, 2, 5))
    full = linear_flop(config, DepthSchedule.full(8, 3))
    for schedule in space.schedules():
        flop = linear_flop(config, DepthSchedule.from_depths(schedule, full_depth=8))
        assert work_cost(space, config).of(schedule) == pytest.approx(flop / full)


def test_layers_are_left_out_by_influence_and_by_loss():
    influence = [9, 1, 5, 2, 3, 9]
    by_influence = nested_sets(6, (5, 4, 3, 2), influence, lambda layers: 0.0, tries=1)
    assert by_influence == [(0, 2, 3, 4, 5), (0, 2, 4, 5), (0, 2, 5), (0, 5)]
    # Without layer 3 the loss is lowest, and it is among the two of least influence.
    by_loss = nested_sets(6, (6, 5, 3), influence, lambda layers: 3 in layers, tries=2)
    assert by_loss == [(0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 5), (0, 2, 5)]
    assert default_depths(8) == (8, 7, 6, 5, 4, 3, 2)
    assert default_depths(30, (16, 2)) == (30, 27, 24, 21, 18, 16, 15, 12, 9, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budgets": {"gold": 0.5}}, ValueError, "budgets must be of work; got 'gold'"),
        ({"budgets": {"work": 1.5}}, ValueError, "budgets.'work'. must be a finite number in"),
        ({"budgets": {"work": 0}}, ValueError, "budgets.'work'. must be above 0; got 0"),
        ({"seeds": [((0, 3),)]}, ValueError, r"seeds.0. must have layers for each of the 3 scales"),
        ({"seeds": [((0, 2),) * 3]}, ValueError, r"seeds.0., a list of layers, must start with 0"),
        (
            {"seeds": [((0, 3), (0, 1, 3), (0, 3))]},
            ValueError,
            r"seeds.0.: .* must be among those of the scale before; got .0, 1, 3. after .0, 3.",
        ),
        ({"loss": lambda prefix: "x"}, TypeError, "loss must be numbers >= 0; got 'x'"),
        ({"beam": 0}, ValueError, "beam must be an integer >= 1; got 0"),
        ({"exact": 2.5}, TypeError, "exact must be an integer"),
        ({"costs": []}, ValueError, "costs must be at least one"),
        ({"space": 3}, TypeError, "space must be of type Space"),
        ({"loss": lambda prefix: -1}, ValueError, "loss must be numbers >= 0; got -1"),
        ({"loss": lambda prefix: [1, float("nan")]}, ValueError, "loss must be numbers >= 0"),
        ({"loss": lambda prefix: []}, ValueError, "loss must be numbers >= 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    space = Space(4, 3, [(0, 3)])
    good = {
        "space": space,
        "costs": [AdditiveCost("work", space, [dict.fromkeys((2, 4), 1.0)] * 3)],
        "loss": lambda prefix: 1.0,
    }
    with pytest.raises(error, match=message):
        search(**{**good, **arguments})
    with pytest.raises(ValueError, match="costs must have different names; got work, work"):
        search(**{**good, "costs": [*good["costs"], *good["costs"]]})


def test_costs_that_are_none_are_refused():
    space = Space(4, 2, [(0, 3)])
    good = {2: [1.0, 1.0], 4: [1.0, 1.0]}
    assert latency_cost(space, good).of(((0, 3), (0, 3))) == 1.0
    for seconds, message in (
        ({4: [1.0, 1.0]}, r"by_depth\[0\] must have the cost of depth 2"),
        ({**good, 2: [1.0]}, r"seconds\[2\] must have 2 numbers"),
        ({**good, 2: [1.0, float("nan")]}, r"by_depth\[1\]\[2\] must be a finite number"),
        ({**good, 2: [-1.0, 1.0]}, r"by_depth\[0\]\[2\] must be a finite number >= 0"),
        ({2: [0.0, 0.0], 4: [0.0, 0.0]}, "latency of the full network must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            latency_cost(space, seconds)
    with pytest.raises(ValueError, match="by_depth must have the costs of 2 scales; got 1"):
        AdditiveCost("work", space, [{2: 1.0, 4: 1.0}])
    with pytest.raises(ValueError, match="influence must have 4 numbers, one for each layer"):
        nested_sets(4, (2,), [0.1] * 3, lambda layers: 0.0)
    with pytest.raises(ValueError, match="tries must be an integer >= 1; got 0"):
        nested_sets(4, (2,), [0.1] * 4, lambda layers: 0.0, tries=0)
