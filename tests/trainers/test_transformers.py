"""transformers.Trainer: a tiny language model, trained, interrupted, resumed."""

import prodigyopt
import pytest
import torch
import transformers

from prodigy_fused import Prodigy

STEPS, HALF, WORDS, LENGTH = 8, 4, 16, 8
D0 = 1e-3  # so that d grows within a few steps
# Each word is followed by the next one, so that there is something to learn.
SENTENCES = [{"input_ids": row, "labels": row} for row in (torch.arange(64)[:, None] + torch.arange(LENGTH)) % WORDS]
SCHEDULES = {
    "constant": {"lr_scheduler_type": "constant"},
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 2},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
}


def gpt2(dtype=torch.float32):
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def llama(dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def arguments(folder, **more):
    return transformers.TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=HALF, per_device_train_batch_size=4, learning_rate=1.0, seed=0,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip


def trainer(model, args, cls=Prodigy, how="class", **options):
    """Returns a Trainer that is given the optimizer, or its class and arguments."""
    options = {"d0": D0, **options}
    if how == "object":
        groups = [{"params": list(model.parameters()), "lr": args.learning_rate}]
        given = {"optimizers": (cls(groups, **options), None)}
    else:
        given = {"optimizer_cls_and_kwargs": (cls, {"lr": args.learning_rate, **options})}
    return transformers.Trainer(model, args, train_dataset=SENTENCES, **given)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def estimate(run):
    """Returns d of a Trainer, whose optimizer is wrapped by accelerate."""
    return run.optimizer.optimizer.d


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("how", ["object", "class"])
@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_resumed(tmp_path, make_model, how, schedule):
    """A run resumed from a checkpoint ends with the bits of one that was not interrupted."""
    args = arguments(tmp_path, **SCHEDULES[schedule])
    whole = trainer(make_model(), args, how=how)
    whole.train()
    assert estimate(whole) > D0
    assert whole.optimizer.optimizer.step_count == STEPS - (schedule != "constant")  # the first has a lr of 0

    resumed = trainer(make_model(), args, how=how)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert estimate(resumed) == estimate(whole)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("option", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}], ids=str)
def test_as_with_prodigyopt(tmp_path, option):
    """In float64, where rounding does not hide a difference."""
    args = arguments(tmp_path, lr_scheduler_type="constant", **option)
    ours, theirs = (trainer(gpt2(torch.float64), args, cls) for cls in (Prodigy, prodigyopt.Prodigy))
    ours.train()
    theirs.train()
    assert estimate(ours) == pytest.approx(theirs.optimizer.param_groups[0]["d"], rel=1e-9)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


def test_a_checkpoint_of_prodigyopt_is_resumed(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="constant")
    theirs = trainer(gpt2(torch.float64), args, prodigyopt.Prodigy)
    theirs.train()
    ours = trainer(gpt2(torch.float64), args)
    ours.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert estimate(ours) == pytest.approx(theirs.optimizer.param_groups[0]["d"], rel=1e-9)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", [{"bf16": True}, {"bf16": True, "max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("fused", [None, True])
def test_mixed_precision(tmp_path, option, fused):
    args = arguments(tmp_path, lr_scheduler_type="constant", **option)
    run = trainer(gpt2(), args, fused=fused)
    run.train()
    assert estimate(run) > D0
    assert losses(run)[-1] < losses(run)[0]


def test_bfloat16_parameters(tmp_path):
    """They train, and a resumed run has the same bits: stochastic rounding goes by the step."""
    args = arguments(tmp_path, lr_scheduler_type="constant")
    whole, resumed = (trainer(gpt2(torch.bfloat16), args) for _ in range(2))
    before = [p.detach().clone() for p in whole.model.parameters()]
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert estimate(whole) == estimate(resumed) > D0
    assert not any(map(torch.equal, before, whole.model.parameters()))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_learning_rates_of_groups_survive_a_schedule(tmp_path):
    """An embedding at half the rate: the schedule scales both."""
    model, args = gpt2(), arguments(tmp_path, lr_scheduler_type="linear")
    embedding = [p for name, p in model.named_parameters() if "wte" in name]
    others = [p for name, p in model.named_parameters() if "wte" not in name]
    opt = Prodigy([{"params": others}, {"params": embedding, "lr": 0.5}], d0=D0)
    seen = []

    class Log(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    run = transformers.Trainer(model, args, train_dataset=SENTENCES, optimizers=(opt, None), callbacks=[Log()])
    run.train()
    assert seen[0] == [1.0, 0.5]
    assert len(seen) == STEPS and all(half == 0.5 * full > 0 for full, half in seen)
