"""One rank's inputs, made global; and inputs that a model tells of."""

from __future__ import annotations

import pytest
import torch
from parity import captured, errors, planned
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autopar
from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.capture.capture import capture
from passes.capture.default_inputs import default_inputs
from passes.capture.inputs import global_inputs, one_sample
from passes.errors import CaptureError
from passes.planner.pipeline import prepare
from passes.space.space import Space, search_space

transformers = pytest.importorskip("transformers")


def test_tensors_with_a_batch_are_repeated_for_every_rank() -> None:
    ids, mask = torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.bool)
    found = global_inputs((ids,), {"mask": mask, "table": torch.zeros(5, 3), "scale": 2.0}, 3)
    assert found.batch_size == 6
    assert found.batch_dims == (0, 0, None, None)
    assert torch.equal(found.args[0], torch.cat([ids, ids, ids]))
    assert found.kwargs["table"].shape == (5, 3)
    assert found.kwargs["scale"] == 2.0


def test_flattened_patches_are_a_multiple_of_the_batch() -> None:
    batch = {"input_ids": torch.zeros(2, 7), "labels": torch.zeros(2, 7), "pixel_values": torch.zeros(32, 48)}
    found = global_inputs((), batch, 2)
    assert found.batch_size == 4
    assert found.kwargs["pixel_values"].shape == (64, 48)


class Placed(nn.Module):
    """Adds to each sample's sequence where its elements lie, which is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(3, 8)

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return (x + self.where(where)).square().mean()


def test_a_sentence_that_forward_fails_with_goes_on_with_one_stop() -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            raise ValueError("It cannot be.")

    with pytest.raises(CaptureError, match=r"It cannot be\. Input 'where' was taken for 8 rows"):
        autopar.plan(Refuses(), {"dp": 2}, (torch.zeros(2, 16, 8), torch.zeros(16, 3)), hardware="h100")


def test_a_table_taken_for_rows_of_the_batch_is_named_where_forward_fails() -> None:
    call = torch.zeros(2, 16, 8), torch.zeros(16, 3)

    def planned(**options: object) -> autopar.Plan:
        return autopar.plan(Placed(), {"dp": 2}, call, hardware="h100", options=autopar.Options(**options))  # type: ignore[arg-type]

    with pytest.raises(CaptureError, match=r"raised RuntimeError: .*'where' was taken for 8 rows per sample; where"):
        planned()
    assert planned(batch_dims={"where": None}).axes
    with pytest.raises(CaptureError) as raised:
        autopar.plan(Placed(), {"dp": 2}, (torch.zeros(2, 16, 8), torch.zeros(2, 4, 3)), hardware="h100")
    assert "rows per sample" not in str(raised.value)


def test_rows_that_may_be_of_all_samples_are_noted() -> None:
    class Nearest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, protos: torch.Tensor) -> torch.Tensor:
            return (self.up(x) @ protos.t()).logsumexp(-1).mean()

    def noted(ranks: int, rows: int, **options: object) -> list[str]:
        call = {"x": torch.zeros(2, 8), "protos": torch.zeros(rows, 8)}
        asked = autopar.Options(**options)  # type: ignore[arg-type]
        plan = autopar.plan(Nearest(), {"dp": ranks}, call, strategy="ddp", hardware="cpu", options=asked)
        return [note for note in plan.notes if "protos" in note]

    assert noted(2, 6) == [
        "input 'protos' was taken for 3 rows per sample; where all samples share it, say "
        "Options(batch_dims={'protos': None})"
    ]
    assert noted(1, 6) == noted(2, 2) == []
    for said in ({"protos": None}, {"x": 0, "protos": 0}):
        assert not noted(2, 6, batch_dims=said)


def test_positions_as_many_as_samples_are_named_where_forward_fails() -> None:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8)

        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return (x + self.table(at)).square().mean()

    call = torch.zeros(3, 3, 8), torch.arange(3)
    with pytest.raises(CaptureError, match=r"'at' was taken for one number per sample; .*batch_dims=\{'at': None\}"):
        autopar.plan(Positioned(), {"dp": 2}, call, hardware="h100")
    options = autopar.Options(batch_dims={"at": None})
    assert autopar.plan(Positioned(), {"dp": 2}, call, hardware="h100", options=options).axes


def test_positions_and_square_masks_are_shared() -> None:
    batch = {
        "ids": torch.zeros(2, 8), "labels": torch.zeros(2, 8), "positions": torch.arange(8), "mask": torch.zeros(8, 8),
        "stacked": torch.zeros(3, 2, 8), "scalar": torch.tensor(1.0),
    }  # fmt: skip
    found = global_inputs((), batch, 4)
    assert dict(zip(batch, found.batch_dims, strict=True)) == {
        "ids": 0, "labels": 0, "positions": None, "mask": None, "stacked": 1, "scalar": None,
    }  # fmt: skip
    assert found.kwargs["stacked"].shape == (3, 8, 8)


def test_stacked_positions_of_a_batch_of_one() -> None:
    ids = torch.zeros(1, 8)
    batch = {"ids": ids, "labels": ids, "positions": torch.zeros(3, 1, 8), "patches": torch.zeros(6, 1, 4)}
    found = global_inputs((), batch, 2)
    assert dict(zip(batch, found.batch_dims, strict=True)) == {"ids": 0, "labels": 0, "positions": 1, "patches": 0}
    assert found.kwargs["positions"].shape == (3, 2, 8)
    assert [note for note in found.notes if "positions" in note] == []


def test_the_user_can_say_where_the_batch_is() -> None:
    source, target = torch.zeros(9, 2, 16), torch.zeros(5, 2, 16)
    found = global_inputs((source, target), {}, 2, {"args.0": 1, "args.1": -2})
    assert found.batch_size == 4
    assert found.batch_dims == (1, 1)
    assert found.args[0].shape == (9, 4, 16)
    with pytest.raises(ValueError, match=r"batch_dims=\{'x': 0\}: the inputs are args.0"):
        global_inputs((source,), {}, 2, {"x": 0})
    with pytest.raises(ValueError, match=r"batch_dims=\{'args.0': 3\}"):
        global_inputs((source,), {}, 2, {"args.0": 3})


def test_what_cannot_be_told_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cannot tell the batch size .*'args.0': \(9, 2, 16\).*9.*batch_dims="):
        global_inputs((torch.zeros(9, 2, 16), torch.zeros(5, 2, 16)), {}, 2)
    with pytest.raises(ValueError, match="no input has a batch dim"):
        global_inputs((torch.tensor(1.0),), {"flag": True}, 2)
    with pytest.raises(ValueError, match=r"no samples.*'x': \(0, 8\).*at least one"):
        global_inputs((), {"x": torch.zeros(0, 8)}, 2)


def test_fake_and_meta_inputs_become_meta_and_keep_requires_grad() -> None:
    with FakeTensorMode():
        fake = torch.zeros(2, 3)
    meta = torch.zeros(2, 3, device="meta", requires_grad=True)
    found = global_inputs((fake, meta), {}, 4)
    assert [(x.device.type, tuple(x.shape), x.requires_grad) for x in found.args] == [
        ("meta", (8, 3), False),
        ("meta", (8, 3), True),
    ]


def test_hugging_face_models_tell_what_they_want() -> None:
    text = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    image = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    speech = transformers.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=10,
        max_target_positions=8, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    both = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    sound = transformers.HubertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        conv_dim=(4,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    for model in (
        transformers.HubertForCTC(sound),
        transformers.HubertForSequenceClassification(sound),
        transformers.LlamaForCausalLM(text),
        transformers.LlamaForSequenceClassification(text),
        transformers.BertForQuestionAnswering(both),
        transformers.BertForMultipleChoice(both),
        transformers.ViTForImageClassification(image),
        transformers.WhisperForConditionalGeneration(speech),
    ):
        if hasattr(model.config, "pad_token_id"):
            model.config.pad_token_id = 0
        inputs = default_inputs(model)
        assert model(**inputs).loss.isfinite()
        assert {v.shape[0] for v in inputs.values()} == {2}
    assert inputs["labels"].shape == (2, 8)
    assert default_inputs(transformers.LlamaForCausalLM(text))["input_ids"].shape == (2, 64)
    heard = transformers.HubertForCTC(sound)
    assert heard(default_inputs(heard, sequence_length=50)["input_values"]).logits.shape == (2, 50, 32)


def test_a_model_that_does_not_tell_asks() -> None:
    class Own(nn.Module):
        def forward(self, pixels: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return pixels * scale

    with pytest.raises(ValueError, match=r"example_inputs: .*one data-parallel rank feeds Own.*takes pixels, scale"):
        default_inputs(Own())
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    )
    with torch.device("meta"), pytest.raises(ValueError, match=r"reads images too, .*takes input_ids, pixel_values"):
        default_inputs(transformers.CLIPModel(config))


def test_a_batch_that_the_batch_axes_do_not_divide_is_refused() -> None:
    program = prepare(capture(nn.Linear(4, 2), (torch.zeros(3, 4),), {}, batch_dims=[0], batch_size=3))
    with pytest.raises(ValueError, match=r"dim 0 has 3 entries over all ranks, which the 2 ranks of the batch axes"):
        search_space(program, topology(hardware("h100"), {"dp": 2}), (0,))


def test_groups_of_samples_that_the_batch_axes_would_cut_are_refused() -> None:
    class Advantage(nn.Module):
        """Of each sample against its group of four."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
            groups = rewards.view(-1, 4)
            return (self.linear(x)[:, 0] * (groups - groups.mean(1, keepdim=True)).flatten()).mean()

    def space(batch: int, ranks: int) -> Space:
        given = torch.zeros(batch, 4), torch.zeros(batch)
        program = prepare(capture(Advantage(), given, {}, batch_dims=[0, 0], batch_size=batch))
        return search_space(program, topology(hardware("h100"), {"dp": ranks}), (0,))

    with pytest.raises(ValueError, match=r"8 entries .* 2 groups of 4, and the 4 ranks .* whole groups: 16 entries"):
        space(8, 4)
    assert space(16, 4).sites
    assert space(8, 2).sites


def test_one_sample_is_the_first_and_what_all_share_stays() -> None:
    ids, scale = torch.arange(12).view(3, 4), torch.tensor(2.0)
    (found, kept), rest = one_sample((ids, scale), {"mask": ids > 3})
    assert torch.equal(found, ids[:1])
    assert kept is scale
    assert torch.equal(rest["mask"], ids[:1] > 3)


def test_a_function_of_torch_that_reads_where_no_trace_sees_it_is_named() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.gru(packed)[1].mean()

    told = r"test_passes_capture_inputs\.py:\d+: torch\.nn\.modules\.rnn\.GRU\.forward reads the values .* padded"
    with pytest.raises(CaptureError, match=told):
        capture(Packed(), (torch.zeros(3, 5, 4), torch.tensor([5, 2, 3])), {}, batch_dims=[0, 0], batch_size=3)


class Renamed(nn.Module):
    """Takes inputs under the names of a parameter and a buffer that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, 7.0))
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.shift += x.mean(0)
        grown = x * 2 if shift.sum() > 0 else x
        return {"loss": (grown * self.scale * scale[:, None] + shift[:, None]).square().mean()}


@pytest.mark.parametrize("strategy", ["fsdp", "megatron"])
def test_an_input_may_have_the_name_of_a_parameter_or_buffer(strategy: str) -> None:
    model = Renamed()
    random = torch.Generator().manual_seed(0)
    given = {"x": torch.randn(4, 6, generator=random), "scale": torch.rand(4, generator=random), "shift": torch.ones(4)}
    program = captured(model, given)
    assert len({entry.name for entry in program.inputs if entry.kind != "tangent"}) == 5
    assert program.guards is not None
    assert program.guards.inputs == ("shift",)
    *_, local = planned(program, {"dp": 2, "tp": 2}, strategy)
    assert errors(model, local, given).gradient < 1e-6
    assert autopar.verify(model, {"dp": 2, "tp": 2}, given, strategy=strategy, hardware="h100").ok


def test_gradients_of_an_input_and_a_parameter_of_one_name_are_two() -> None:
    given = {"x": torch.randn(4, 6), "scale": torch.rand(4, requires_grad=True), "shift": torch.ones(4)}
    found = autopar.verify(Renamed(), {"dp": 2}, given, strategy="fsdp", hardware="h100")
    assert found.ok
    assert {t.name: t.shape for t in found.tensors if t.kind == "gradient"} == {"scale": (6,), "scale (input)": (8,)}
