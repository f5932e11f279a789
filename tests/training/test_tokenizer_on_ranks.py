"""Two ranks measure the health of a tokenizer, and keep its frozen parts, as one process with the same global batch."""

import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit_pl.pipeline.pretrained import load_tokenizer
from tests.conftest import flags
from tests.observing import Runs, Topology
from tests.test_distributed import EXACT, TINY

pytestmark = [pytest.mark.slow, pytest.mark.survival]

STEPS, GLOBAL_BATCH = 6, 12
TOPOLOGIES = {"1 process": Topology(), "2 ranks": Topology(ranks=2), "accumulating": Topology(ranks=2, accumulation=3)}
COUNTED = ("codebook_usage", "perplexity", "dead_codes", "dead_code_age", "oldest_code_age")
AVERAGED = ("feature_norm", "codebook_norm", "commitment_distance")
# The entropy of a micro-batch would train another network with accumulation, and restarts make codes that are equal.
QUANTIZER = '--model.network.quantizer={"name": "gradient", "entropy_weight": 0}'
# Any unused code is an alarm, from the second measurement on.
HEALTH = '--health={"least_usage": 1.0, "least_perplexity": 1.0, "grace_steps": 0, "patience": 2, "dead_after": 1}'


@pytest.fixture(scope="module")
def runs(tiny_shards, tiny_pretrained, tmp_path_factory):
    """Runs of the tiny recipe that fine-tune a pretrained tokenizer."""
    tiny = yaml.safe_load((TINY / "tokenizer.yaml").read_text())
    del tiny["model"]["network"]  # its sizes are those of the pretrained tokenizer
    tiny["data"] |= {"global_batch": GLOBAL_BATCH}
    tiny["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    words = ["tokenizer", f"--data={tiny_shards}", f"--pretrained={tiny_pretrained}", *flags(tiny), HEALTH, EXACT]
    return Runs(tmp_path_factory.mktemp("ranks"), [*words, "--model.flip_probability=0.5"], GLOBAL_BATCH)


def logged(runs, name):
    """Returns the logged health of a run: (step, value) by name."""
    events = EventAccumulator(str(runs.folder / name / "tokenizer"))
    events.Reload()
    return {
        metric: [(event.step, event.value) for event in events.Scalars(f"train/{metric}")]
        for metric in (*COUNTED, *AVERAGED)
    }


def test_two_ranks_measure_the_health_of_one_process_and_give_its_alarms(runs):
    for name, topology in TOPOLOGIES.items():
        runs.leg(name, topology, QUANTIZER)
    measured = {name: logged(runs, name) for name in TOPOLOGIES}
    one = measured["1 process"]
    assert [step for step, _ in one["codebook_usage"]] == list(range(1, STEPS + 1))
    assert len({value for _, value in one["perplexity"]}) == STEPS
    assert 0 < one["dead_codes"][-1][1] < 16
    for metric in COUNTED:
        assert measured["2 ranks"][metric] == measured["accumulating"][metric] == one[metric], metric
    for metric in AVERAGED:  # of the last micro-batch
        torch.testing.assert_close(torch.tensor(measured["2 ranks"][metric]), torch.tensor(one[metric]))
    reports = [json.loads((runs.folder / name / "tokenizer" / "health.json").read_text()) for name in TOPOLOGIES]
    alarms = [[(each["cause"], each["step"]) for each in report] for report in reports]
    assert ("codebook_usage", 2) in alarms[0]
    assert alarms[1] == alarms[0]
    assert {cause for cause, _ in alarms[2]} == {cause for cause, _ in alarms[0]}


def test_frozen_parts_keep_every_bit_on_two_ranks_and_the_rest_trains_as_in_one_process(runs, tiny_pretrained):
    start = load_tokenizer(tiny_pretrained / "tokenizer").network.state_dict()
    frozen = {name for name in start if name.startswith(("encoder.", "quantizer."))}
    states = {}
    for name in ("1 process", "2 ranks"):
        runs.leg(f"frozen, {name}", TOPOLOGIES[name], "--model.freeze=[encoder, quantizer]")
        seen = runs.seen(f"frozen, {name}")
        states[name] = seen.state["state_dict"]
        for part in ("network", "ema_network"):
            kept = {each for each in start if torch.equal(states[name][f"{part}.{each}"], start[each])}
            assert kept == frozen, part
        assert len(seen.state["optimizer_states"][0]["state"]) == len(start.keys() - frozen)
    first, second = (rank_weights(runs, "frozen, 2 ranks", rank) for rank in (0, 1))
    assert first == second
    for each in start:
        key = f"network.{each}"
        torch.testing.assert_close(states["2 ranks"][key], states["1 process"][key], atol=1e-5, rtol=1e-5)


def rank_weights(runs, name, rank):
    """Returns the exact sum of all weights after each micro-batch of a rank."""
    lines = (runs.folder / f"{name}-leg00-rank{rank}.jsonl").read_text().splitlines()
    assert len(lines) >= STEPS
    return [json.loads(line)["weights"] for line in lines]
