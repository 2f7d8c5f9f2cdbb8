"""The loop on several ranks: what one process would do, shared; stopped together, resumed bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed import pool

from grpo_kernels.training import sharding
from grpo_kernels.training.loop import Trainer, train
from grpo_kernels.training.options import Options
from grpo_kernels.training.ranks import Several, start_ranks
from grpo_kernels.training.report import RunFolder, SilentFolder

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]

SMALL = {"prompts": 4, "group": 4, "minibatch": 8, "steps": 3, "hidden": 32, "layers": 2, "numbers": 3, "warmup": 2}
SMALL |= {"device": "cpu"}


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """generate() has no deterministic cumsum; on a CPU its results are deterministic all the same."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


def trainer_of(changes: dict, several: bool = True) -> Trainer:
    torch.use_deterministic_algorithms(False)
    options = Options(**{**SMALL, **changes})
    return Trainer(options, Several("cpu", options.tp) if several else None)


def untimed(records: list[dict]) -> list[dict]:
    """What is compared, of numbers alone."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second", "sample")} for r in records]


def alone(changes: dict) -> dict:
    """What one process is asked for in place of ``changes``."""
    return {**changes, "fsdp": False, "tp": 1}


def records_of(cases: list[dict], several: bool = True) -> list[list[dict]]:
    found = []
    for changes in cases:
        trainer = trainer_of(changes, several)
        found.append(untimed([trainer.train_step() for _ in range(trainer.options.steps)]))
    return found


KL = {"kl": 0.05, "ref_every": 2, "entropy": 0.01}
UNEVEN = {"max_new_tokens": 12, "prompts": 2, "group": 2, "minibatch": 4}
"""Few sequences that may be long: a rank's last ends before another's."""
CASES = {
    2: [
        {},
        {"linear_loss": True, **KL},
        {"fsdp": True, "loss": "dapo", "dynamic_sampling": True, "overlong_buffer": 2, "micro_batch": 2},
        {"fsdp": True, "linear_loss": True, **KL},
        {"loss": "dapo_paper", "prompts": 6, "minibatch": 12, "micro_batch": 4},  # a rank's second is one of padding
        {"loss": "reinforce", "group": 1, "prompts": 16, "minibatch": 6, "epochs": 1},
        {"loss": "gspo", "reference_loss": True, **UNEVEN},
        {"tp": 2, "linear_loss": True, **KL},
    ],
    4: [
        {"loss": "dr_grpo", "minibatch": 3},  # fewer sequences than ranks
        {"fsdp": True, "temperature": 0.5, **UNEVEN, "prompts": 4},
        {"tp": 2, "linear_loss": True, "loss": "dapo", "dynamic_sampling": True, "micro_batch": 2},
        {"linear_loss": True, "loss": "dapo_paper", "prompts": 8, "minibatch": 12, "micro_batch": 4},
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_do_what_one_process_does(ranks):
    """The same problems, completions, rewards and minibatches; sums that are added in another order."""
    wanted = records_of([alone(changes) for changes in CASES[ranks]], several=False)
    for found in pool(ranks).run(records_of, CASES[ranks]):
        for case, records, expected in zip(CASES[ranks], found, wanted, strict=True):
            for record, one in zip(records, expected, strict=True):
                assert record.keys() == one.keys(), case
                assert (record["reward"], record["length"]) == (one["reward"], one["length"]), case
                assert record == pytest.approx(one, rel=1e-4, abs=1e-6), case
    for case, records in zip(CASES[ranks], wanted, strict=True):
        assert any("loss" in record and record["reward"] for record in records), case  # dynamic sampling left something


def gradients_of(cases: list[dict], several: bool = True) -> list[dict[str, torch.Tensor]]:
    """Of the first optimizer step, which is of a whole rollout."""
    found = []
    for changes in cases:
        trainer, gradients = trainer_of({**changes, "minibatch": 16, "epochs": 1, "max_grad_norm": 1e9}, several), {}

        def keep(optimizer, args, kwargs, trainer=trainer, gradients=gradients):
            for name, parameter in trainer.model.named_parameters():
                gradients[name] = sharding.whole(parameter.grad).clone()

        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train_step()
        found.append(gradients)
    return found


def test_two_ranks_are_two_micro_batches():
    """Of one optimizer step: every weight's gradient within the rounding of fp32."""
    routes = [{"linear_loss": linear, "kl": 0.1, "loss": "dapo"} for linear in (False, True)]
    cases = [{**route, "fsdp": fsdp} for fsdp in (False, True) for route in routes]
    cases.append({**routes[1], "tp": 2})
    wanted = gradients_of([{**route, "micro_batch": 8} for route in routes], several=False)
    wanted = wanted * 2 + wanted[1:]
    for ranks in pool(2).run(gradients_of, cases):
        for case, found, expected in zip(cases, ranks, wanted, strict=True):
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
                assert error <= 5e-6, (case, name, float(error))


def test_two_micro_batches_on_each_rank():
    """Gradients are averaged with the last, and are those of one."""
    wanted = gradients_of([{"micro_batch": 8}], several=False)[0]
    for found in pool(2).run(gradients_of, [{"micro_batch": 4}, {"micro_batch": 3, "fsdp": True}]):
        for gradients in found:
            for name, gradient in gradients.items():
                assert (gradient - wanted[name]).abs().max() <= 5e-6 * wanted[name].abs().max(), name


def test_a_teacher_on_every_rank(tmp_path):
    """Whole on each, or cut over them as the policy is: the gradients of one process."""
    options = Options(**{**SMALL, "hidden": 48, "seed": 5})
    RunFolder(tmp_path / "teacher", options, resume=False).save_checkpoint(Trainer(options).state())
    taught = {"teacher": str(tmp_path / "teacher"), "divergence": "forward_kl", "loss": "none"}
    cases = [{**taught, "linear_loss": linear} for linear in (False, True)]
    wanted = gradients_of([{**case, "micro_batch": 8} for case in cases], several=False)
    cases.append({**cases[1], "fsdp": True})
    for ranks in pool(2).run(gradients_of, cases):
        for case, found, expected in zip(cases, ranks, [*wanted, wanted[1]], strict=True):
            for name, gradient in found.items():
                error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
                assert error <= 5e-6, (case, name, float(error))


def folder_of(trainer: Trainer, path: Path) -> RunFolder:
    return RunFolder(path, trainer.options, resume=False) if trainer.ranks.writes else SilentFolder(path)


def resumed(path: Path, changes: dict) -> tuple[list, list, dict, dict]:
    whole = trainer_of(changes)
    records = [whole.train_step() for _ in range(4)]
    first = trainer_of(changes)
    for _ in range(2):
        first.train_step()
    folder = folder_of(first, path)
    folder.save_checkpoint(first.state())
    first.ranks.wait()
    second = trainer_of(changes)
    second.load_state(folder.load_checkpoint())
    continued = [second.train_step() for _ in range(2)]
    second.ranks.wait()
    weights = [{name: sharding.whole(p) for name, p in t.model.named_parameters()} for t in (whole, second)]
    return untimed(records), untimed(continued), *weights


RESUMED = [{**KL, "steps": 4}, {"fsdp": True, "linear_loss": True, **KL, "steps": 4}]
RESUMED += [{"tp": 2, "linear_loss": True, "steps": 4}]


@pytest.mark.parametrize("changes", RESUMED, ids=str)
def test_resume_is_bit_for_bit(tmp_path, changes):
    """By as many ranks; by one process within rounding, which reads the same file."""
    for records, continued, whole, second in pool(2).run(resumed, tmp_path / "run", changes):
        assert continued == records[2:]
        assert all(torch.equal(whole[name], second[name]) for name in whole)
    one = trainer_of(alone(changes), several=False)
    one.load_state(RunFolder(tmp_path / "run", one.options, resume=True).load_checkpoint())
    assert one.step == 2
    for record in records[2:]:
        assert untimed([one.train_step()])[0] == pytest.approx(record, rel=1e-4, abs=1e-6)


def tied_model(path: Path) -> Path:
    """A GPT-2, whose norm lies behind its layers under another name, and whose head is its embedding."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", "<unk>", *"0123456789>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.1}
    config = transformers.GPT2Config(vocab_size=13, eos_token_id=0, bos_token_id=None, **sizes, **dropout)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def nothing_to_learn(path: Path, changes: dict) -> list[str]:
    """Save after a step in which dynamic sampling has left nothing: no backward pass has cut the weights again."""
    trainer = trainer_of({**changes, "dynamic_sampling": True, "loss": "dapo"})
    trainer.task.score = lambda problem, completion: 0.0
    record = trainer.train_step()
    folder = folder_of(trainer, path)
    folder.save_checkpoint(trainer.state())
    trainer.ranks.wait()
    trainer.load_state(folder.load_checkpoint())
    return list(record)


@pytest.mark.parametrize("linear", [False, True])
def test_tied_weights(tmp_path, linear):
    model = {"model": str(tied_model(tmp_path / "model")), "linear_loss": linear, "kl": 0.1, "hidden": 64}
    wanted = records_of([model], several=False)[0]
    for ddp, fsdp in pool(2).run(records_of, [model, {**model, "fsdp": True}]):
        assert all(record == pytest.approx(one, rel=1e-4, abs=1e-6) for record, one in zip(ddp, wanted, strict=True))
        assert all(record == pytest.approx(one, rel=1e-4, abs=1e-6) for record, one in zip(fsdp, wanted, strict=True))
    for names in pool(2).run(nothing_to_learn, tmp_path / "run", {**model, "fsdp": True}):
        assert "reward" in names
        assert "loss" not in names
    for error in pool(2).errors_of(trainer_of, {**model, "tp": 2, "linear_loss": True}):
        assert str(error) == "--tp needs a head with a weight of its own; GPT2LMHeadModel's is the embedding."


def interrupted(path: Path) -> tuple[int, int, bool]:
    """Rank 1 gets a SIGTERM in its second step, and another while all are saving."""
    trainer = trainer_of({"steps": 50})
    step, state = trainer.train_step, trainer.state

    def signalled(function):
        def run():
            if torch.distributed.get_rank() == 1 and trainer.step >= 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return function()

        return run

    trainer.train_step, trainer.state = signalled(step), signalled(state)
    train(trainer, folder_of(trainer, path))
    return trainer.step, RunFolder.load_checkpoint(SilentFolder(path))["step"], signal.getsignal(signal.SIGTERM)


def test_a_signal_to_one_rank_stops_all(tmp_path):
    """After the same step, with everything saved and handlers as they were."""
    for step, saved, handler in pool(2).run(interrupted, tmp_path):
        assert (step, saved) == (2, 2)
        assert handler == signal.SIG_DFL
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def refused(path: Path) -> list[str]:
    """By a rule that every rank sees, and by what one alone knows."""
    said = []
    for attempt in (
        lambda: trainer_of({"prompts": 5}),
        lambda: Several("cpu").decide(lambda: RunFolder(path / "file", Options(**SMALL), resume=False)),
        lambda: Several("cpu:0"),
    ):
        try:
            attempt()
        except (ValueError, SystemExit) as error:
            said.append(str(error))
    return said


def failing() -> str:
    """What each rank gets of a decision that ends in Ctrl-C on the one that makes it."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    try:
        Several("cpu").decide(interrupted)
    except BaseException as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def test_no_rank_waits_for_a_decision_that_fails():
    assert pool(2).run(failing) == ["KeyboardInterrupt ", "SystemExit KeyboardInterrupt: "]


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("a file")
    for prompts, folder in pool(2).run(refused, tmp_path):
        assert prompts == "--prompts must be a multiple of the 2 ranks that share them; got 5."
        assert "file cannot be written" in folder
    with pytest.raises(ValueError, match=r"--fsdp needs several ranks: torchrun --nproc-per-node P -m grpo_kernels"):
        start_ranks("cpu", fsdp=True)


def torchrun(*arguments: str, folder: Path, program: tuple[str, ...] = ("-m", "grpo_kernels")) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.Popen(
        [*start, *program, "train", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(process: subprocess.Popen, seconds: float = 120) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


def rewards_in(log: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in log.read_text().splitlines()]


def rewards_of_one_process(steps: int, first: int | None = None, **changes) -> list[float]:
    """Of a run of so many steps, which its learning rate follows from, the ``first``."""
    one = trainer_of({"steps": steps, **changes}, several=False)
    return [one.train_step()["reward"] for _ in range(first or steps)]


NAMED = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "steps"]


@pytest.mark.slow
def test_torchrun(tmp_path):
    """One log, one report, the rewards of one process."""
    process = torchrun(*NAMED, "--steps=3", "--fsdp", "--linear-loss", "--out=run", folder=tmp_path)
    out, err = finished(process)
    assert process.returncode == 0, err[-2000:]
    assert out.count("run folder: run") == out.count("step 3, ") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("checkpoint.safetensors", "curves.png", "log.jsonl", "options.json")
    ]
    assert rewards_in(tmp_path / "run" / "log.jsonl") == rewards_of_one_process(3)


@pytest.mark.nightly
def test_ctrl_c_and_resume(tmp_path):
    """Stopped by a Ctrl-C that torchrun passes on, resumed by what the first run says."""
    process = torchrun(*NAMED, "--steps=40", "--out=run", folder=tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    finally:
        out, _ = finished(process)
    assert process.returncode != 0
    assert out.count("interrupted; continue with: torchrun --nproc-per-node 2 -m grpo_kernels train --resume run") == 1
    assert len(rewards_in(log)) < 40
    process = torchrun("--resume=run", folder=tmp_path)
    out, err = finished(process)
    assert process.returncode == 0, err[-2000:]
    assert out.count("step 40, ") == 1
    assert rewards_in(log) == rewards_of_one_process(40)


@pytest.mark.nightly
def test_an_error_of_one_rank_ends_all(tmp_path):
    """With torchrun's exit status, and nothing left running."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\nfrom grpo_kernels.__main__ import main\nfrom grpo_kernels.training.loop import Trainer\n"
        "plain = Trainer.train_step\n"
        "def step(self):\n"
        "    if self.step == 2 and os.environ['RANK'] == '1':\n        raise RuntimeError('out of something')\n"
        "    return plain(self)\n"
        "Trainer.train_step = step\nsys.exit(main(sys.argv[1:]))\n"
    )
    process = torchrun(*NAMED, "--steps=40", "--out=run", folder=tmp_path, program=(str(script),))
    _, err = finished(process)
    assert process.returncode == 1
    assert "out of something" in err


@pytest.mark.nightly
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_learns(fsdp):
    """Two numbers between 0 and 3, 150 steps: from chance to nearly always right, for ten steps with the completions of
    one process."""
    changes = {"prompts": 16, "group": 8, "minibatch": 64, "numbers": 2, "largest": 3, "hidden": 64, "lr": 2e-3}
    changes |= {"steps": 150, "warmup": 10}
    expected = rewards_of_one_process(first=10, **changes)
    for records in pool(2).run(records_of, [{**changes, "fsdp": fsdp}], seconds=300):
        rewards = [record["reward"] for record in records[0]]
        assert rewards[:10] == expected[:10]
        assert sum(rewards[:5]) / 5 < 0.35
        assert sum(rewards[-20:]) / 20 > 0.8
