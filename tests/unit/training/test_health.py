"""Promises about steps that are not applied, and about counted operations."""

import json
import math

import pytest

from deepseek_sft.convert import tiny_model
from deepseek_sft.training import first_batch, flops, health
from deepseek_sft.training.health import StepHealth


def judged(policy: StepHealth, norms, loss=1.0, first=1):
    return [policy.judge(step, loss, norm) for step, norm in enumerate(norms, first)]


@pytest.mark.parametrize(("loss", "norm", "named"), [(math.nan, 1.0, "loss"), (1.0, math.inf, "gradient norm")])
def test_a_step_that_is_not_finite_is_never_applied_and_stops_unless_it_may_be_skipped(loss, norm, named):
    stopped = StepHealth("stop", None, "warn").judge(7, loss, norm)
    assert (stopped.apply, stopped.stop, stopped.kind) == (False, True, "not_finite")
    assert f"the {named} of step 7" in stopped.message
    skipped = StepHealth("skip", None, "warn").judge(7, loss, norm)
    assert (skipped.apply, skipped.stop) == (False, False)


@pytest.mark.parametrize(
    ("on_spike", "apply", "stop"), [("warn", True, False), ("skip", False, False), ("stop", False, True)]
)
def test_a_spike_is_judged_by_the_median_of_the_steps_before(on_spike, apply, stop):
    policy = StepHealth("stop", 10.0, on_spike)
    assert all(verdict.kind == "fine" for verdict in judged(policy, [1.0] * 30))
    assert policy.judge(31, 1.0, 9.9).kind == "fine"
    verdict = policy.judge(32, 1.0, 11.0)
    assert (verdict.kind, verdict.apply, verdict.stop) == ("spike", apply, stop)
    assert "11 times the usual 1" in verdict.message


def test_the_falling_norms_of_the_first_steps_are_no_spikes():
    policy = StepHealth("stop", 2.0, "stop")
    assert all(verdict.kind == "fine" for verdict in judged(policy, [1.0, 50.0] * (health.LEAST // 2)))


def test_a_lasting_change_of_scale_becomes_the_new_measure():
    policy = StepHealth("stop", 5.0, "skip")
    judged(policy, [1.0] * health.WINDOW)
    later = judged(StepHealth("stop", 5.0, "warn", policy.state()), [20.0] * health.WINDOW)
    assert [verdict.kind for verdict in (later[0], later[-1])] == ["spike", "fine"]


def test_skipping_gives_up_when_no_step_is_good_any_more():
    policy = StepHealth("skip", None, "warn")
    verdicts = judged(policy, [math.nan] * (health.MOST_IN_A_ROW + 1))
    assert [verdict.stop for verdict in verdicts] == [False] * health.MOST_IN_A_ROW + [True]
    assert "skipped as well" in verdicts[-1].message


def test_a_good_step_ends_the_row_of_skipped_ones():
    policy = StepHealth("skip", None, "warn")
    for _ in range(3):
        judged(policy, [math.nan] * health.MOST_IN_A_ROW)
        assert policy.judge(1, 1.0, 1.0).apply
    assert policy.skipped == 3 * health.MOST_IN_A_ROW


def test_a_resumed_run_judges_as_an_uninterrupted_one():
    norms = [1 + step % 3 for step in range(60)] + [100.0, math.nan, 2.0, 400.0]
    whole = StepHealth("skip", 10.0, "skip")
    expected = judged(whole, norms)
    first = StepHealth("skip", 10.0, "skip")
    verdicts = judged(first, norms[:61])
    state = json.loads(json.dumps(first.state()))  # as the marker keeps it
    resumed = StepHealth("skip", 10.0, "skip", state)
    verdicts += judged(resumed, norms[61:], first=62)
    assert verdicts == expected
    assert resumed.state() == whole.state()


def test_operations_of_a_step_count_the_chosen_experts_and_the_keys_that_are_seen():
    config = tiny_model.config_of(tiny_model.TinyShape())
    counted = flops.StepFlops.of(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, value = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
    attention = hidden * config["q_lora_rank"] + config["q_lora_rank"] * heads * query
    attention += hidden * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    attention += config["kv_lora_rank"] * heads * (config["qk_nope_head_dim"] + value) + heads * value * hidden
    expert = 3 * hidden * config["moe_intermediate_size"]
    chosen = config["num_experts_per_tok"] + config["n_shared_experts"]
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    products = layers * attention + dense * 3 * hidden * config["intermediate_size"]
    products += (layers - dense) * (chosen * expert + config["n_routed_experts"] * hidden)
    products += config["vocab_size"] * hidden
    norms = layers * (config["q_lora_rank"] + config["kv_lora_rank"])  # inside attention, counted with it by name
    assert counted.per_token == pytest.approx(2 * products, abs=2 * norms)
    assert counted.per_pair == 2 * layers * heads * (query + value)
    # Two samples of 3 tokens see 2 × 6 pairs; forward once, backward twice.
    assert counted.step(6, 12) == pytest.approx(3 * (6 * counted.per_token + 12 * counted.per_pair))


def test_utilisation_is_the_share_of_all_ranks_peaks():
    rate, share = flops.utilisation(flops=4e15, seconds=2.0, ranks=10, peak_tflops=1000.0)
    assert (rate, share) == (200.0, 0.2)
    assert flops.utilisation(4e15, 2.0, 10, None) == (200.0, None)


def test_the_first_batch_shows_what_is_learned_and_every_special_token(tmp_path):
    tiny_model.write_tiny(tmp_path / "base", tiny_model.TinyShape(), 0, 8_000_000)
    tokenizer = first_batch.read_tokenizer(tmp_path / "base")
    ids = tokenizer.encode("Question? Answer.", add_special_tokens=False).ids
    end = tokenizer.token_to_id("<｜end▁of▁sentence｜>")
    question = tokenizer.encode("Question?", add_special_tokens=False).ids
    learned = [False] * len(question) + [True] * (len(ids) - len(question) + 1)
    path = first_batch.write(tmp_path, [("row 0", [*ids, end], learned)], tokenizer)
    text = path.read_text()
    assert f"== row 0: {len(ids) + 1} tokens, {sum(learned)} trained" in text
    assert "[context] Question?\n[trained]  Answer.<｜end▁of▁sentence｜>" in text
