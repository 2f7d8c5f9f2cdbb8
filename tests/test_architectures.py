"""Every architecture of transformers is served right from hidden states or refused, as the committed page says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
import transformers
from architectures import judge, tiny
from architectures.inputs import call_of
from architectures.judge import NO_BUILD, REFUSED, SERVED, WRONG, NoCase, Verdict, verdict_of
from architectures.table import Row, counts, page, read, row_of
from architectures.tiny import NOT_TEXT, class_names

from grpo_kernels import hf

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
SAME_VERSION = f"transformers {transformers.__version__} " in PAGE.read_text()
STRIDE = 4
FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "MistralForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "GraniteForCausalLM",
    "Cohere2ForCausalLM",
    "GPT2LMHeadModel",
    "PhiForCausalLM",
    "FalconH1ForCausalLM",
    "MambaForCausalLM",
    "MiniCPM3ForCausalLM",
    "InklingForCausalLM",
    "RobertaForCausalLM",
    "OPTForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "ChameleonForConditionalGeneration",
)
"""Run for every change, with every fourth of the others; the rest are nightly."""


def cases() -> list:
    chosen = {*FAMILIES, *[name for name in class_names() if name not in FAMILIES][::STRIDE]}
    return [pytest.param(name, marks=[] if name in chosen else [pytest.mark.nightly]) for name in class_names()]


@functools.cache
def committed() -> dict[str, Row]:
    return {row.name: row for row in read(PAGE.read_text())}


def without_numbers(text: str) -> str:
    """What two machines measure differs in its last digits."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", text)


@pytest.mark.parametrize("name", cases())
def test_class(name):
    """Served with the numbers of its own logits, or refused by a message that says what was found; as on the page."""
    row = row_of(name)
    assert row.verdict.kind != WRONG, row.verdict
    if row.verdict.kind == REFUSED:
        assert re.match(r"attach: expected .*; got .+", row.verdict.reason), row.verdict
    wanted, mine = committed().get(name), read(page([row]))[0]
    if SAME_VERSION and wanted is not None and wanted.verdict.kind != NO_BUILD:  # a library that is here may build it
        assert without_numbers(str(mine.verdict)) == without_numbers(str(wanted.verdict))
        assert mine.head == wanted.head


@pytest.mark.skipif(not SAME_VERSION, reason="the page is of another version of transformers")
def test_the_page_is_the_generated_one():
    """Its rows are tested above; everything else follows from them."""
    assert list(committed()) == class_names()
    assert page([*committed().values()]) == PAGE.read_text()
    assert not {*committed()} & {*NOT_TEXT}


def test_every_class_is_on_the_page_once():
    assert {*FAMILIES} <= {*class_names()}
    assert len(class_names()) > 300
    assert {*class_names(), *NOT_TEXT} <= {*dir(transformers)}


def test_most_classes_are_built():
    """A class that is not says what is missing on the machine; no case is lost to a mistake of the generator."""
    missing = [row for row in committed().values() if row.verdict.kind == NO_BUILD]
    assert len(missing) < 0.02 * len(committed())
    assert all("requires the" in row.verdict.reason for row in missing), missing


def test_counts():
    rows = [Row(kind, "", Verdict(kind), "") for kind in (SERVED, SERVED, REFUSED, WRONG, NO_BUILD)]
    lines = counts(rows).splitlines()
    assert lines[0] == "- built: 4 of 5 (80.0 %)"
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["2 (50.0 %)", "1 (25.0 %)", "1 (25.0 %)"]


def test_a_page_is_read_as_it_was_written():
    rows = [
        Row("AForCausalLM", "a", Verdict(SERVED), "`lm_head` × 0.3"),
        Row("BForCausalLM", "b", Verdict(REFUSED, "attach: expected c; got b (BForCausalLM)."), "`cls.decoder`"),
        Row("CForCausalLM", "c", Verdict(REFUSED, "attach: expected c; got c (CForCausalLM)."), ""),
    ]
    found = read(page(rows))
    assert [(row.name, row.model_type, row.verdict.kind, row.head) for row in found] == [
        (row.name, row.model_type, row.verdict.kind, row.head) for row in rows
    ]
    assert found[1].verdict == found[2].verdict == Verdict(REFUSED, "attach: expected c; got TYPE (CLASS).")
    assert page(found) == page(rows)


HEADS = {
    "LlamaForCausalLM": "`lm_head`",
    "PhiForCausalLM": "`lm_head` with bias",
    "GraniteForCausalLM": "`lm_head` × 0.4",
    "Cohere2ForCausalLM": "`lm_head` × 0.3",
    "MiniCPM3ForCausalLM": "of rows × 8: `lm_head`",
    "InklingForCausalLM": "of rows × 0.588: `lm_head`, 120 of its 128 columns",
    "Gemma2ForCausalLM": "`lm_head`, then a function of each logit",
    "BartForConditionalGeneration": "`lm_head` + one row",
    "RobertaForCausalLM": "of transformed rows: `lm_head.decoder` with bias",
    "ChameleonForConditionalGeneration": "`lm_head`, some columns masked",
    "ProphetNetForConditionalGeneration": "of rows of another shape: `lm_head`, other shapes",
    "FSMTForConditionalGeneration": "no output embeddings: `model.decoder.embed_tokens` looks ids up",
    "ClvpForCausalLM": "no output embeddings that it calls",
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_off_their_identity(name):
    """What a class does to its logits is seen in its case, so that leaving it out would be WRONG."""
    model = tiny.tiny(name)
    assert judge.truth_of(model, call_of(model)).head == HEADS[name]


SEEING = [name for name in FAMILIES if "Llava" in name or "VL" in name or name.startswith("Gemma3For")]


@pytest.mark.parametrize("name", SEEING)
def test_pictures_are_seen(name):
    """An image's places are in the ids, and what it shows is in the log-probs of the text after it."""
    model = tiny.tiny(name)
    call = call_of(model)
    other = dataclasses.replace(call, inputs={**call.inputs, "pixel_values": -call.inputs["pixel_values"]})
    log_probs = [judge.truth_of(model, one).log_probs[call.mask] for one in (call, other)]
    assert (log_probs[0] - log_probs[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "InklingForCausalLM", "LlavaForConditionalGeneration"])
def test_the_judge_agrees_with_the_models_own_logits(name):
    """``from_logits`` gives the same numbers, so that nothing is found but that they are of logits."""
    verdict, _ = verdict_of(name, functools.partial(hf.attach, from_logits=True))
    assert verdict.kind == WRONG
    assert re.fullmatch(r"lm_head was applied to \d+ rows, which makes their logits", verdict.reason), verdict


def attach_then(change):
    def attach(model):
        hf.attach(model)
        change(model)

    return attach


def scale_weight(model):
    model.lm_head.weight.data.mul_(1.001)


FAULTS = {
    "a scaled head": (attach_then(scale_weight), "log-probs are .* apart"),
    "another objective": (lambda model: hf.attach(model, "reinforce"), "losses are|gradient of"),
    "a scaled gradient": (
        attach_then(lambda model: model.model.norm.weight.register_hook(lambda gradient: 1.01 * gradient)),
        r"the gradient of model\.norm\.weight",
    ),
    "a frozen parameter": (
        attach_then(lambda model: model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)),
        r"the gradient of model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "an error that is none of ours": (lambda model: model.no_such_attribute, "raised AttributeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_wrong(fault):
    attach, words = FAULTS[fault]
    verdict, _ = verdict_of("LlamaForCausalLM", attach)
    assert verdict.kind == WRONG
    assert re.search(words, verdict.reason), verdict


def test_a_model_that_is_left_changed_is_wrong():
    def attach(model):
        hf.attach(model)
        before = model.forward

        def forward(*args, **inputs):
            out = before(*args, **inputs)
            if "grpo" not in inputs:
                out.logits = 2 * out.logits
            return out

        model.forward = forward

    assert verdict_of("LlamaForCausalLM", attach)[0] == Verdict(
        WRONG, "without grpo=, an attached model has other logits"
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM"])
def test_logits_that_are_changed_after_attach(name):
    """A hook is traced, so the call is another model's than the truth; one that no trace shows is refused."""

    def scale(model):
        model.lm_head.register_forward_hook(lambda module, inputs, output: 1.5 * output)

    def scale_real_ones(model):
        model.lm_head.register_forward_hook(
            lambda module, inputs, output: 1.5 * output if type(output) is torch.Tensor else output
        )

    assert verdict_of(name, attach_then(scale))[0].kind == WRONG
    assert verdict_of(name, attach_then(scale_real_ones))[0].kind == REFUSED


def test_a_gradient_that_the_logits_lack_is_wrong():
    model = tiny.tiny("LlamaForCausalLM")
    mine, call = copy.deepcopy(model), call_of(model)
    model.model.norm.weight.requires_grad_(False)
    verdict = judge.judge(mine, call, judge.truth_of(model, call))
    assert verdict == Verdict(WRONG, "model.norm.weight has a gradient, and has none from the logits")


def test_a_case_that_shows_nothing_is_none():
    model = tiny.tiny("LlamaForCausalLM")
    model.lm_head.weight.data.zero_()
    with pytest.raises(NoCase, match="show nothing"):
        judge.truth_of(model, call_of(model))


def test_no_exception_of_a_class_stops_the_sweep(monkeypatch):
    monkeypatch.setattr(judge, "tiny", lambda name: torch.zeros(1).no_such_method())
    verdict, head = verdict_of("LlamaForCausalLM")
    assert verdict.kind == NO_BUILD
    assert verdict.reason.startswith("AttributeError: ")
