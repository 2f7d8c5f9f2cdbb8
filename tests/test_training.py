"""The loop: deterministic, resumable, equal in micro-batches and to the plain loss, and it learns."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grpo_kernels.__main__ import main
from grpo_kernels.training import checkpoint as checkpoint_file
from grpo_kernels.training import tasks
from grpo_kernels.training.loop import Trainer, train
from grpo_kernels.training.options import Options
from grpo_kernels.training.policy import ByteTokenizer, response_logits
from grpo_kernels.training.report import RunFolder
from grpo_kernels.training.rollout import roll_out
from grpo_kernels.training.saved_model import save_policy

SMALL = {"prompts": 4, "group": 4, "minibatch": 8, "steps": 6, "hidden": 32, "layers": 1, "numbers": 3, "warmup": 2}


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """generate() has no deterministic cumsum; on a CPU its results are deterministic all the same."""
    torch.use_deterministic_algorithms(False)


def small(**changes) -> Options:
    """Options of a short run; a model from disk has its sizes, another task its own."""
    left_out = {"hidden", "layers"} if "model" in changes else {"numbers"} if "task" in changes else set()
    return Options(**{**{name: value for name, value in SMALL.items() if name not in left_out}, **changes})


def run(folder: Path, resume: bool = False, **changes) -> tuple[Trainer, list[dict]]:
    options = small(**changes)
    run_folder = RunFolder(folder, options, resume)
    return train(Trainer(options), run_folder, resume), run_folder.records()


def untimed(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def same_parameters(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


OPTIONS = {
    "grpo": {},
    "kl, reference refreshed": {"kl": 0.05, "ref_every": 2, "entropy": 0.01},
    "dapo, dynamic sampling": {"loss": "dapo", "dynamic_sampling": True, "overlong_buffer": 2},
    "dapo_paper": {"loss": "dapo_paper"},
    "dr_grpo": {"loss": "dr_grpo"},
    "gspo": {"loss": "gspo", "micro_batch": 4},
    "reinforce": {"loss": "reinforce", "group": 1, "prompts": 16},
    "two digits": {"largest": 12, "reward": "order"},
}


SAMPLED = ("kl, reference refreshed", "dapo, dynamic sampling", "reinforce")
"""In every run; the others' losses and tasks differ from one of these by little."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLED else pytest.mark.nightly) for name in OPTIONS]
)
def test_is_deterministic(tmp_path, name):
    """Every option runs; the same seed gives the same bits, another seed does not."""
    a, records = run(tmp_path / "a", **OPTIONS[name])
    b, again = run(tmp_path / "b", **OPTIONS[name])
    assert untimed(records) == untimed(again)
    assert same_parameters(a, b)
    assert not same_parameters(a, run(tmp_path / "c", seed=1, **OPTIONS[name])[0])
    assert len(records) == 6
    assert (tmp_path / "a" / "curves.png").stat().st_size > 10_000
    assert all(0 <= record["reward"] <= 1 for record in records)
    assert ("kl" in records[-1]) == ("kl" in name)


@pytest.mark.parametrize("options", [{}, {"kl": 0.05, "ref_every": 2}], ids=str)
def test_resume_is_bit_for_bit(tmp_path, options):
    """Killed after step 5 with a checkpoint of step 4: what was logged since is forgotten and done again."""
    whole, records = run(tmp_path / "whole", checkpoint_every=2, **options)
    first = Options(**{**SMALL, **options}, checkpoint_every=2)
    folder = RunFolder(tmp_path / "cut", first, False)
    trainer = Trainer(first)
    for _ in range(5):
        folder.log(trainer.train_step())
        if trainer.step % 2 == 0:
            folder.save_checkpoint(trainer.state())
    folder.close()
    resumed, continued = run(tmp_path / "cut", resume=True, checkpoint_every=2, **options)
    assert untimed(continued) == untimed(records)
    assert same_parameters(whole, resumed)


def test_micro_batches_are_the_minibatch(tmp_path):
    """1 x 16 = 4 x 4 with ragged lengths, for every aggregation: the same update up to fp32 rounding."""
    for loss in ("grpo", "dapo", "dr_grpo", "reinforce", "dapo_paper"):
        updates = []
        for micro_batch in (16, 4):
            options = Options(**{**SMALL, "minibatch": 16, "micro_batch": micro_batch, "loss": loss, "epochs": 1})
            trainer = Trainer(options)
            before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
            record = trainer.train_step()
            after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
            updates.append((record["loss"], record["grad_norm"], record["entropy"], after - before))
        for a, b in zip(*updates, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=2e-4, atol=2e-6, msg=loss)


def test_micro_batch_lengths_are_ragged():
    """Else the test above could not tell a wrong denominator."""
    trainer = Trainer(Options(**SMALL))
    rollout = roll_out(trainer.model, trainer.tokenizer, trainer.task, random.Random(0), 4, 4, 4, 1.0)
    assert len(set(rollout.mask.sum(-1).tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("other", [pytest.param("reference_loss", marks=pytest.mark.nightly), "linear_loss"])
def test_other_routes_give_the_same_curve(tmp_path, other):
    """50 steps, two losses from one seed: parameters within fp32 noise, the same rollouts."""
    options = {**SMALL, "steps": 50, "prompts": 8, "numbers": 4, "minibatch": 32}
    fused, records = run(tmp_path / "fused", **options)
    plain, expected = run(tmp_path / "plain", **{other: True}, **options)
    assert [r["reward"] for r in records] == [r["reward"] for r in expected]
    for name in ("loss", "entropy", "grad_norm", "ratio_mean"):
        got, wanted = ([r[name] for r in rs] for rs in (records, expected))
        assert got == pytest.approx(wanted, rel=2e-3, abs=2e-5), name
    for p, q in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", ["grpo", *(pytest.param(loss, marks=pytest.mark.nightly) for loss in ("reinforce", "gspo"))]
)
def test_learns(tmp_path, loss):
    """Two numbers between 0 and 3, 150 steps: from chance to nearly always right."""
    options = {"prompts": 16, "group": 8, "minibatch": 64, "numbers": 2, "largest": 3, "steps": 150, "hidden": 64}
    epochs = 1 if loss == "reinforce" else 2  # without a ratio nothing corrects for the policy's first move
    _, records = run(tmp_path, loss=loss, layers=2, lr=2e-3, epochs=epochs, **{**options, "warmup": 10})
    rewards = [record["reward"] for record in records]
    assert sum(rewards[:5]) / 5 < 0.35
    assert sum(rewards[-20:]) / 20 > 0.8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The folder of a run of another width, and of weights that say something."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    options = Options(**{**SMALL, "hidden": 48, "layers": 2, "seed": 5})
    trainer = Trainer(options)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2)
    RunFolder(folder, options, False).save_checkpoint(trainer.state())
    return str(folder)


def test_distillation_is_learnt(tmp_path, teacher):
    """Of the teacher alone: the divergence falls, and is logged and drawn; without a policy term as it is with one."""
    taught = {"teacher": teacher, "divergence": "reverse_kl", "prompts": 8, "steps": 40, "lr": 5e-3, "minibatch": 16}
    trainer, records = run(tmp_path / "run", loss="none", **taught)
    divergences = [record["divergence"] for record in records]
    assert trainer.teacher.config.hidden_size == 48 != trainer.model.config.hidden_size
    assert not trainer.teacher.training
    assert sum(divergences[-5:]) < 0.75 * sum(divergences[:5])
    assert records[-1]["loss"] == pytest.approx(divergences[-1], rel=0.2)  # by sequence, and by token
    _, beside = run(tmp_path / "beside", loss="dapo", divergence_coef=0.5, **{**taught, "steps": 1})
    assert beside[0]["loss"] == pytest.approx(0.5 * beside[0]["divergence"], rel=0.2)
    _, without = run(tmp_path / "without", steps=1, prompts=8)
    assert (without[0]["reward"], without[0]["length"]) == (records[0]["reward"], records[0]["length"])
    assert "divergence" not in without[0]


@pytest.mark.parametrize("other", ["reference_loss", "linear_loss"])
def test_a_teacher_on_other_routes(tmp_path, teacher, other):
    taught = {"teacher": teacher, "divergence": "jsd", "loss": "dapo"}
    fused, records = run(tmp_path / "fused", **taught)
    plain, expected = run(tmp_path / "plain", **{other: True}, **taught)
    for name in ("reward", "loss", "divergence", "grad_norm"):
        got, wanted = ([r[name] for r in rs] for rs in (records, expected))
        assert got == pytest.approx(wanted, rel=2e-3, abs=2e-5), name
    for p, q in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_a_teacher_is_there_again_when_a_run_is_resumed(tmp_path, teacher):
    taught = {"teacher": teacher, "divergence": "forward_kl", "loss": "none", "steps": 4}
    whole, records = run(tmp_path / "whole", **taught)
    options = Options(**{**SMALL, **taught})
    folder, trainer = RunFolder(tmp_path / "cut", options, False), Trainer(options)
    for _ in range(2):
        folder.log(trainer.train_step())
    folder.save_checkpoint(trainer.state())
    folder.close()
    resumed, continued = run(tmp_path / "cut", resume=True, **taught)
    assert untimed(continued) == untimed(records)
    assert same_parameters(whole, resumed)


def test_a_resumed_run_keeps_its_teacher(tmp_path, teacher, monkeypatch):
    """From any folder, and by its weights: the folder may move, another teacher in its place is refused."""
    shutil.copytree(teacher, tmp_path / "here" / "teacher")
    monkeypatch.chdir(tmp_path / "here")
    small = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "steps": 1}.items()]
    taught = ["--teacher", "teacher", "--divergence", "jsd", "--loss", "none", "--out", "run"]
    assert main(["train", *small, *taught]) == 0
    saved = json.loads((tmp_path / "here" / "run" / "options.json").read_text())
    assert saved["teacher"] == str(tmp_path / "here" / "teacher")
    (tmp_path / "here" / "run" / "options.json").write_text(json.dumps(saved | {"steps": 2}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for changed in (["--teacher", str(tmp_path)], ["--divergence", "tvd"], ["--divergence-coef", "2"]):
        with pytest.raises(SystemExit, match="--resume continues a run as it was started"):
            main(["train", "--resume", "../here/run", *changed])

    file = tmp_path / "here" / "teacher" / "checkpoint.safetensors"
    kept = file.read_bytes()
    state = checkpoint_file.read(file)
    state["model"]["lm_head.weight"][3, 5] += 1e-3
    checkpoint_file.write(file, *checkpoint_file.flatten(state))
    with pytest.raises(SystemExit, match=r"--teacher .* has other weights than at the steps before \(SHA-256"):
        main(["train", "--resume", "../here/run"])
    file.write_bytes(kept)
    assert main(["train", "--resume", "../here/run"]) == 0
    with RunFolder(tmp_path / "here" / "run", Options(), resume=True).log_path.open() as log:
        assert len(log.readlines()) == 2


@pytest.mark.slow
@pytest.mark.nightly
def test_most_of_a_teachers_reward_takes_fewer_steps(tmp_path):
    """Most of it: of two digits between 0 and 3, on the student's own samples, from half of the width."""
    sizes = {"prompts": 16, "group": 8, "minibatch": 64, "numbers": 2, "largest": 3, "layers": 2, "lr": 2e-3}
    _, taught = run(tmp_path / "teacher", **{**sizes, "steps": 150, "hidden": 64, "warmup": 10})
    student = {**sizes, "steps": 60, "hidden": 32, "warmup": 10, "seed": 1}
    _, alone = run(tmp_path / "alone", **student)
    teacher = {"teacher": str(tmp_path / "teacher"), "divergence": "reverse_kl"}
    _, records = run(tmp_path / "student", **student, **teacher)

    def reached(records: list[dict], reward: float) -> int:
        rewards = [record["reward"] for record in records]
        return next(end for end in range(20, len(rewards) + 1) if sum(rewards[end - 20 : end]) >= 20 * reward)

    wanted = 0.85 * sum(record["reward"] for record in taught[-20:]) / 20
    assert wanted > 0.8
    assert reached(records, wanted) < 0.8 * reached(alone, wanted)


def test_response_logits_do_not_depend_on_padding():
    """Left padding of a prompt changes nothing: positions count attended tokens."""
    trainer = Trainer(Options(**SMALL))
    ids = torch.randint(2, 10, (1, 7))
    plain = response_logits(trainer.model, ids, torch.ones_like(ids), 4)
    padded_ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], -1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)], -1)
    padded = response_logits(trainer.model, padded_ids, mask, 7)
    assert plain.shape == (1, 4, len(trainer.tokenizer))
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)


def test_rollout_masks_what_follows_the_end():
    trainer = Trainer(Options(**SMALL))
    rollout = roll_out(trainer.model, trainer.tokenizer, trainer.task, random.Random(1), 8, 4, 6, 1.0)
    end = trainer.tokenizer.eos_token_id
    assert not rollout.mask.all()
    for ids, live in zip(rollout.response_ids.tolist(), rollout.mask.tolist(), strict=True):
        count = ids.index(end) + 1 if end in ids else len(ids)
        assert live == [i < count for i in range(len(ids))]
    prompts = rollout.ids[:, : rollout.prompt_length]
    assert torch.equal(prompts[0::4], prompts[3::4])  # a group shares its prompt


def rates(groups_with_signal: list[int]) -> list[list[float]]:
    """The learning rate of every optimizer step, in rollouts of which so many of four groups are kept."""
    trainer = Trainer(Options(**{**SMALL, "minibatch": 4, "epochs": 1}, lr=1e-3, dynamic_sampling=True))
    step, found = trainer.optimizer.step, []
    for groups in groups_with_signal:
        rewards = iter([float(n % 2 and n < 4 * groups) for n in range(16)])
        trainer.task.score = lambda problem, text, rewards=rewards: next(rewards)
        found.append([])
        trainer.optimizer.step = lambda: found[-1].append(trainer.optimizer.param_groups[0]["lr"]) or step()
        trainer.train_step()
    return found


def test_the_learning_rate_falls_to_zero_whatever_is_dropped():
    """A rollout of which dynamic sampling keeps half or nothing is a step of the run as any other."""
    kept = [4, 2, 0, 2, 0, 1]
    whole, some = rates([4] * 6), rates(kept)
    assert [len(each) for each in some] == kept
    assert all(mine == full[: len(mine)] for mine, full in zip(some, whole, strict=True))
    assert whole[0][:2] == [5e-4, 1e-3 * (1 - 1 / 24)]
    assert whole[5][3] == pytest.approx(1e-3 / 24)
    late = rates([0, 0, 1, 1, 1])  # AdamW's moments are empty until then
    assert late[2] + late[3] == [5e-4, pytest.approx(1e-3 * (1 - 12 / 24))]


def test_sort_scores():
    task = tasks.Sort(4, 9)
    problem = tasks.Problem("3120>", [0, 1, 2, 3])
    scores = {
        "0123": (1, 1),
        "0132": (0.5, 0.5 + 0.5 * 2 / 3),
        "3120": (0.5, 0.5 + 0.5 / 3),
        "": (0, 0),
        "01": (0.5, 0.25 + 0.5 / 3),
        "01233": (0.8, 0.4 + 0.5),
        "0>23": (0, 0),
    }
    for text, (positions, order) in scores.items():
        assert task.score(problem, text) == pytest.approx(positions), text
        assert tasks.Sort(4, 9, "order").score(problem, text) == pytest.approx(order), text
    assert tasks.Sort(1, 9, "order").score(tasks.Problem("3>", [3]), "3") == 1
    spaced = tasks.Sort(2, 12)
    assert spaced.score(tasks.Problem("12 3>", [3, 12]), "3 12") == 1
    sample = task.sample(50, random.Random(0))
    assert all(sorted(map(int, p.prompt[:-1])) == p.answer for p in sample)


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer(b"0123456789>")
    ids = tokenizer.encode("31>0")
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]) == "31>0"
    assert max(ids) < len(tokenizer) == 13


def test_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    trainer, records = run(tmp_path, task="reasoning_gym:basic_arithmetic", steps=1, max_new_tokens=5, hidden=16)
    assert records[0]["length"] > 0
    problem = trainer.task.sample(1, random.Random(0))[0]
    _, entry = problem.answer
    assert trainer.task.score(problem, f" {entry['answer']}") == 1
    assert trainer.task.score(problem, "no number") < 1


def test_a_verifier_that_raises(capsys):
    """What a policy writes is no reason to end a run: reward 0, and said once. A dataset that cannot be made is."""
    pytest.importorskip("reasoning_gym")
    task = tasks.make_task("reasoning_gym:prime_factorization", 4, 9, "positions")
    problem = task.sample(1, random.Random(0))[0]
    assert [task.score(problem, answer) for answer in ("?", "01²3")] == [0.0, 0.0]
    assert capsys.readouterr().err.count("cannot score every completion") == 1
    with pytest.raises(SystemExit, match="--task reasoning_gym:composite cannot be made without options of its own"):
        tasks.make_task("reasoning_gym:composite", 4, 9, "positions")


@pytest.mark.parametrize("completion", ["01²3", "٠١٢٣", "1" * 5000, "12 " + "9" * 5000])
def test_what_is_no_number_scores_nothing(completion):
    """str.isdigit is true of more than int takes, which takes no more than 4300 digits."""
    for largest in (9, 99):
        task = tasks.Sort(largest=largest)
        assert task.score(tasks.Problem("3120>", [0, 1, 2, 3]), completion) <= 0.25


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.5}, {"min_p": 0.3}, {"num_beams": 2}, {"suppress_tokens": [5, 6]}], ids=str
)
def test_options_of_generation_beside_a_model(options):
    """Of its file: responses are drawn from the distribution that the log-probs are of, and the file is kept."""
    trainer = Trainer(small(steps=1))
    arguments = (trainer.model, trainer.tokenizer, trainer.task)

    def drawn():
        torch.manual_seed(0)
        return roll_out(*arguments, random.Random(0), 8, 4, 4, 1.0).ids

    wanted = drawn()
    trainer.model.generation_config.update(**options)
    assert torch.equal(drawn(), wanted)
    assert {name: getattr(trainer.model.generation_config, name) for name in options} == options


def saved_model(folder: Path) -> Path:
    """A tiny Llama and a word-level tokenizer, as save_pretrained leaves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", "<unk>", *"0123456789>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_from_disk(tmp_path):
    path = saved_model(tmp_path / "model")
    trainer, records = run(tmp_path / "run", model=str(path), steps=2)
    assert type(trainer.model).__name__ == "LlamaForCausalLM"
    assert trainer.tokenizer.pad_token_id == trainer.tokenizer.eos_token_id == 0
    assert len(records) == 2


def command(*arguments: str, folder: Path, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "grpo_kernels", "train", *arguments], cwd=folder, capture_output=True, text=True,
        env=environment, timeout=300, **options,
    )  # fmt: skip


TINY = ["--prompts", "4", "--group", "4", "--minibatch", "8", "--hidden", "32", "--layers", "1", "--numbers", "3"]


@pytest.mark.nightly
def test_signals_save_and_resume_continues(tmp_path):
    """A signal in the middle: the step is finished, everything saved, and --resume ends where an unbroken run does."""
    arguments = [*TINY, "--steps", "30", "--out"]
    expected = command(*arguments, "whole", folder=tmp_path)
    assert expected.returncode == 0, expected.stderr[-1000:]
    log, lines = tmp_path / "cut" / "log.jsonl", 0
    for number, how in ((signal.SIGINT, [*arguments, "cut"]), (signal.SIGTERM, ["--resume", "cut"])):
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_kernels", "train", *how], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= lines + 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130, err[-1000:]
        assert "finishing this step, then saving" in err
        assert "continue with: python -m grpo_kernels train --resume cut" in out
        assert (tmp_path / "cut" / "curves.png").exists()
        lines = log.read_text().count("\n")
        assert lines < 30
    resumed = command("--resume", "cut", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-1000:]
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert untimed(logs[0]) == untimed(logs[1])


def test_bad_runs(tmp_path, monkeypatch, capsys):
    """Each a message that names what is wrong, an exit status, and nothing lost."""
    (tmp_path / "file").write_text("a file")
    trainer, _ = run(tmp_path / "run", steps=2)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    monkeypatch.chdir(tmp_path)

    def fails(*arguments: str) -> str:
        try:
            status = main(["train", *arguments])
        except SystemExit as error:
            status, message = 1, str(error)
        else:
            message = capsys.readouterr().err
        assert status not in (0, 130)
        return message

    assert "the run folder file/run cannot be written" in fails("--out", "file/run")
    assert "already holds a run. Continue it with --resume run" in fails("--out", "run")
    (tmp_path / "run" / "log.jsonl").rename(tmp_path / "log")
    assert "already holds a run. Continue it with --resume run" in fails("--out", "run")
    (tmp_path / "log").rename(tmp_path / "run" / "log.jsonl")
    assert "nowhere is not the folder of a run: its options.json cannot be read" in fails("--resume", "nowhere")
    said = fails("--resume", "run", "--lr", "1")
    assert "--resume continues a run as it was started: give no other options with it; --lr was 0.0006, got 1.0" in said
    assert "--loss must be one of reinforce, ppo, grpo" in fails("--loss", "gropo")
    assert "--steps must be at least 1; got 0" in fails("--steps", "0")
    assert "--lr must be > 0 and at most 100; got nan" in fails("--lr", "nan")
    assert "--backend must be one of cpu, cuda, triton, torch; got 'gpu'" in fails("--backend", "gpu")
    assert "--device foo cannot be used here: " in fails("--device", "foo")
    assert "--overlong-buffer must be at most the 5 tokens of a response; got 50" in fails("--overlong-buffer", "50")
    assert "--warmup must be finite and >= 0; got -1" in fails("--warmup", "-1")
    assert "--kl must be finite and >= 0; got -1" in fails("--kl", "-1")
    assert "--hidden has no effect with --model x, which has its own" in fails("--model", "x", "--hidden", "32")
    gym = ("--task", "reasoning_gym:basic_arithmetic")
    assert "--reward has no effect with --task reasoning_gym:basic" in fails(*gym, "--reward", "order")
    assert "--task sort has no datasets; got 'sort:descending'" in fails("--task", "sort:descending")
    assert "--wandb must name a project; got ''" in fails("--wandb", "")
    assert "--group must be at least 2 with --dynamic-sampling" in fails("--group", "1", "--dynamic-sampling")
    assert "--group must be at least 2 with --prompts 1" in fails("--group", "1", "--prompts", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]  # no folder of a run that never was
    assert "--micro-batch must be a multiple of --group 8" in fails("--loss", "dapo_paper", "--micro-batch", "3")
    assert "--task must be one of sort, reasoning_gym; got 'sorting'" in fails("--task", "sorting")
    assert "Did you mean 'positions'" in fails("--reward", "position")
    assert "no causal language model could be loaded from this folder" in fails("--model", "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == kept

    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(kept["checkpoint.safetensors"][: len(kept["checkpoint.safetensors"]) // 2])
    message = fails("--resume", "run")
    assert "checkpoint.safetensors is damaged" in message
    assert "Nothing was changed" in message
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == kept["log.jsonl"]
    checkpoint_file.write(checkpoint, {}, {"step": 1})
    assert "is not a checkpoint of this loop" in fails("--resume", "run")
    checkpoint.unlink()
    assert "holds no checkpoint to resume from" in fails("--resume", "run")
    (tmp_path / "run" / "options.json").write_text('{"seeed": 1}')
    assert "options.json cannot be read (it has seeed, which is no option of this version)" in fails("--resume", "run")


def test_bad_teachers(tmp_path, teacher, monkeypatch, capsys):
    """Each said in words, and before there is a folder."""
    monkeypatch.chdir(tmp_path)

    def fails(*arguments: str) -> str:
        try:
            main(["train", *arguments])
        except SystemExit as error:
            return str(error)
        return capsys.readouterr().err

    with_kl = ("--divergence", "reverse_kl")
    assert "--teacher x needs --divergence, what is minimised: one of forward_kl, reverse_kl" in fails("--teacher", "x")
    assert "--divergence reverse_kl needs --teacher" in fails(*with_kl)
    assert "--loss none has no policy term: it needs --teacher" in fails("--loss", "none")
    assert "--divergence must be one of forward_kl" in fails("--teacher", teacher, "--divergence", "reversed")
    assert "--divergence-coef must be finite and >= 0" in fails("--divergence-coef", "-1")
    assert "--tp must be 1 with --teacher" in fails("--teacher", teacher, *with_kl, "--tp", "2", "--linear-loss")
    for name in ("empty", "early", "damaged", "other"):
        (tmp_path / name).mkdir()
    said = fails("--teacher", "empty", *with_kl)
    assert said.startswith(f"--teacher {tmp_path}/empty: no causal language model could be loaded from this folder")
    for name in ("early", "damaged"):
        (tmp_path / name / "options.json").write_bytes((Path(teacher) / "options.json").read_bytes())
    assert f"--teacher {tmp_path}/early: the run holds no checkpoint" in fails("--teacher", "early", *with_kl)
    (tmp_path / "damaged" / "checkpoint.safetensors").write_text("no tensors")
    assert f"--teacher {tmp_path}/damaged: checkpoint.safetensors is not" in fails("--teacher", "damaged", *with_kl)
    said = fails("--teacher", teacher, *with_kl, "--largest", "12")
    assert (
        f"--teacher {teacher} has another vocabulary (13 columns) than the policy (14; 'Ġ' is None there and 13 here)"
        in said
    )
    assert fails("--teacher", f"{tmp_path}/nope", *with_kl).endswith(f"nope: there is no such folder in {tmp_path}")
    assert fails("--teacher", "other/nope", *with_kl).endswith("other/nope: there is no such folder in other")
    said = fails("--teacher", "damaged/checkpoint.safetensors", *with_kl)
    assert said.endswith(f"is a file: give its folder, which says what it is of: {tmp_path}/damaged")
    saved_model(tmp_path / "other")
    said = fails("--teacher", "other", *with_kl)
    assert "has another vocabulary (13 columns) than the policy (13; '<end>' is 0 there and 1 here)" in said
    assert not (tmp_path / "runs").exists()


def test_a_teacher_from_disk(tmp_path):
    """Of transformers' own format, with its tokenizer."""
    path = str(saved_model(tmp_path / "model"))
    _, records = run(tmp_path / "run", model=path, teacher=path, divergence="reverse_kl", loss="none", steps=2)
    assert 0 <= records[0]["divergence"] < 1e-3  # the policy's own weights, until it moves
    assert records[1]["divergence"] < 1e-2


def test_a_saved_policy_is_a_teacher(tmp_path):
    """Of --save-model, for a run from scratch; and a run for one that goes on from its saved model."""
    trainer = Trainer(small())
    RunFolder(tmp_path / "run", trainer.options, False).save_checkpoint(trainer.state())
    save_policy(trainer.model, trainer.tokenizer, tmp_path / "saved", True)
    learning = {"divergence": "reverse_kl", "loss": "none", "steps": 1}
    for name, options in (("a", {"teacher": "saved"}), ("b", {"teacher": "run", "model": "saved"})):
        options = {option: str(tmp_path / where) for option, where in options.items()}
        _, records = run(tmp_path / name, **options, **learning)
        assert 0 <= records[0]["divergence"] < 1e-3


def test_missing_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"training needs transformers: pip install 'grpo-kernels\[train\]'"):
        Trainer(Options(**SMALL))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match="needs the reasoning-gym package"):
        tasks.make_task("reasoning_gym:basic_arithmetic", 4, 9, "positions")


def test_default_run_is_cheap_to_describe():
    """The defaults are those that the documented figure was measured with."""
    options = Options()
    assert (options.steps, options.numbers, options.largest, options.prompts, options.group) == (900, 4, 9, 32, 8)
    assert options.response_limit() == 5


def test_a_run_of_several_ranks_goes_on_in_one_process(tmp_path, monkeypatch, capsys):
    """What cuts weights over ranks is left out, and said; the run's own options stay as they were."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    trained, _ = run(folder, steps=2, linear_loss=True)
    saved = json.loads((folder / "options.json").read_text()) | {"tp": 2, "steps": 3}
    (folder / "options.json").write_text(json.dumps(saved))
    assert main(["train", "--resume", "run"]) == 0
    assert "goes on in one process" in capsys.readouterr().out
    assert json.loads((folder / "options.json").read_text()) == saved
    assert trained.step == 2
