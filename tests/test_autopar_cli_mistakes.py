"""Each mistake in a call: exit code 2, one line on standard error that says what would do, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from commands import MODELS, Here, autopar, environment

from autopar.cli import main
from autopar.cli.arguments import FLAGS
from autopar.cli.flags import with_flags

MISTAKES = [
    ("frob", "invalid choice: 'frob'"),
    ("plan", "required: MODEL"),
    ("plan MODEL", "pass --mesh dp=2,tp=2, or --from PLAN"),
    ("plan MODEL --from HERE/edited-badly.json", "cannot be RR -> RS(1) over axes of (2, 2) ranks"),
    ("plan MODEL --from HERE/edited-badly.json", "at rest, what compute splits is split alike"),
    ("explain HERE/edited.json up.weight", "was edited after it was solved"),
    ("check HERE/edited.json MODEL", "was edited after it was solved"),
    ("verify MODEL --plan HERE/edited.json", "was edited after it was solved"),
    ("plan MODEL --mesh dp=2,tp", "write name=ranks, as in dp=4,tp=2"),
    ("plan MODEL --mesh dp=2,dp=2", "stands twice"),
    ("plan MODEL --mesh dp=0", "is no axis"),
    ("plan MODEL --mesh dp=2 --hardware h100 --batch-axes ep", "ep"),
    (
        "plan MODEL --mesh dp=2 --hardware h100 --batch-axes ep",
        "plan: --batch-axes ep: the mesh has no axis 'ep'",
    ),
    ("plan MODEL --mesh dp=2 --batch-axes 2", "names no axes; write dp or dp,ep"),
    ("plan MODEL --mesh dp=2,tp=2 --hardware cpu --async-tp", "autopar plan: --async-tp is for GPUs"),
    (
        "price MODEL --gpus 2 --hardware h100 --global-batch 2 --virtual 4",
        "--virtual 4, but --pp 1; there are no",
    ),
    (
        "price MODEL --gpus 1 --global-batch 1 --layers 1",
        "autopar price: unrecognized arguments: --layers 1; see autopar",
    ),
    ("plan MODEL --mesh dp=2 --recompute some", "choose from"),
    ("plan MODEL --mesh a=1,b=1,c=1,d=1,e=1,f=1", "6 axes"),
    ("plan MODEL --mesh dp=99999999999999999999", "has 99,999,999,999,999,999,999 ranks; at most 2,147,483,648 work"),
    ("plan MODEL --mesh dp=\u00b2", "is no axis; write name=ranks"),
    ("plan MODEL --mesh dp=2 --hardware=", "--hardware: hardware file '' cannot be read: Is a directory; pass"),
    ("plan MODEL --mesh dp=2 --hardware h9", "unknown hardware 'h9'; known are a100-40gb"),
    ("plan MODEL --mesh dp=2 --strategy zero", "choose from"),
    ("plan MODEL --mesh dp=2,tp=2 --hardware cpu --async-tp", "reach each other's memory; 'cpu' is a CPU"),
    ("plan MODEL --mesh dp=2 --hardware h100 --async-tp", "every axis of {'dp': 2} splits the batch; add one"),
    ("plan MODEL --mesh dp=2 --batch none", "positive whole number"),
    ("plan llama3-8b --mesh dp=2 --hardware h100 --batch 99999999", "a batch of 99,999,999 is 1,526 GiB of inputs"),
    ("plan MODEL --mesh dp=2 --memory-budget much", "is no size; write bytes, or 80GiB"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight", "write PATTERN=LAYOUT"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight=Q", "argument --pin: 'up.weight=Q': 'Q' is no layout"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin zq=R", "names no parameter of the model; its parameters are"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.wieght=R", "names no parameter of the model; the nearest name"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight=P", "P, but a parameter is no partial sum"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight=RR", "RR has 2 placements, but the mesh has 1 axis"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight=S(0)", "axis 'dp' splits the batch, so compute needs the"),
    (
        "plan MODEL --mesh tp=2 --hardware h100 --pin up.w*=R --pin up.*ht=S(0)",
        "both name up.weight, and ask for R and S(0)",
    ),
    ("plan MODEL --mesh tp=2 --hardware h100 --pin up.bias=R --pin up.bias=S(0)", "--pin names 'up.bias' twice"),
    ("plan MODEL --mesh tp=2 --hardware h100 --pin embed.weight=S(2)", "cannot be S(2)"),
    ("plan MODEL --from HERE/renamed.json", "parameters: the plan has no line 'up.wieght'; did you mean 'up.weight'?"),
    ("plan MODEL --from HERE/misspelt.json", "parameters['up.weight']: in_compute: 'RQ' is no layout"),
    ("plan MODEL --from HERE/short.json", "in_compute: 'R' has not one placement for each axis of dp, tp"),
    ("plan MODEL --from HERE/unknown.json", "the plan's options have an unknown field 'seeds'"),
    ("plan MODEL --from HERE/budget.json", 'the plan\'s options: memory_budget is "much": bytes per device'),
    ("plan MODEL --from HERE/recompute.json", 'the plan\'s options: recompute is "some": known are'),
    ("check HERE/recompute.json MODEL", 'the plan\'s options: recompute is "some": known are'),
    ("plan MODEL --from HERE/accumulate.json", 'the plan\'s options: accumulate is "2": at least 1 micro-batch'),
    ("plan MODEL --from HERE/pins.json", "the plan's options: pins is [3]: a mapping of names' patterns to layouts"),
    ("plan MODEL --from HERE/policy.json", "the plan's mp_policy is 'bf16', no object of dtypes"),
    ("diff HERE/negative.json HERE/plan.json", "step_time_s: found -1.0, expected 0 or more"),
    ("plan MODEL --from HERE/no-batches.json", "accumulate: found 0, expected 1 or more"),
    ("diff HERE/plan.json HERE/nan.json", "step_time_s: found nan, expected 0 or more"),
    ("check HERE/batch-axes.json MODEL", "batch-axes.json: batch_axes: the mesh has no axis 'pp'; it has dp, tp"),
    ("diff HERE/plan.json HERE/no-ranks.json", "no-ranks.json: axes: 'dp' has 0 ranks, expected 1 or more"),
    ("check HERE/other-inputs.json MODEL", "the plan's inputs ('example') are none that a plan is written with"),
    ("plan MODEL --from HERE/inputs.json", "the plan's inputs ('example') are no JSON"),
    ("plan MODEL --from HERE/newer.json", "a plan of version 2, but this autopar reads version 1"),
    ("plan MODEL --from HERE/edited.json --mesh tp=2", "RS(0) has 2 placements, but the mesh has 1 axis"),
    (
        "plan llama3-8c --mesh dp=2",
        "did you mean llama3-8b or llama3-70b or llama3-405b? A model is a preset, a Hugging",
    ),
    ("plan nope --mesh dp=2", "A model is a preset (llama2-7b, "),
    ("plan HERE/nope.py:build --mesh dp=2", "no such file"),
    ("plan HERE/models.py --mesh dp=2", "name the function"),
    ("plan HERE/nope.py --mesh dp=2", "nope.py: no such file; pass file.py:function"),
    ("plan HERE/models.py:nope --mesh dp=2", "no function 'nope'; it has Tiny, build"),
    ("plan HERE/models.py:number --mesh dp=2", "returned a int; return a torch.nn.Module"),
    ("plan HERE/models.py:fails --mesh dp=2", "AttributeError: 'Tiny' object has no attribute 'nothing'"),
    ("plan HERE/models.py:no_inputs --mesh dp=2", "its forward takes ids, labels"),
    ("plan HERE/models.py:branches --mesh dp=2 --hardware h100", "models.py:"),
    ("plan HERE/models.py:nothing --mesh dp=2", "returned None; return a torch.nn.Module"),
    ("plan HERE/models.py:leaves --mesh dp=2", "SystemExit: 0"),
    ("plan HERE/models.py:wants --mesh dp=2", "models.py: TypeError: wants() missing 1 required"),
    ("plan HERE/models.py:too_long --mesh dp=2 --hardware h100", "the model's forward raised"),
    ("plan HERE/models.py:weighed --mesh dp=2 --hardware h100", "share it, say --batch-dim weight=none"),
    ("inspect HERE/models.py:weighed --mesh dp=2", "share it, say --batch-dim weight=none"),
    (
        "verify HERE/models.py:unclear --mesh dp=2 --hardware h100",
        "where the batch is, for example --batch-dim weight=0",
    ),
    (
        "plan HERE/models.py:weighed --mesh dp=2 --batch-dim wieght=none",
        "--batch-dim wieght=none: the inputs are w",
    ),
    ("plan HERE/models.py:weighed --mesh dp=2 --batch-dim weight=2", "--batch-dim weight=2, but the input is"),
    ("inspect HERE/models.py:weighed --mesh dp=2 --batch-dim x=0 --batch-dim x=1", "--batch-dim names 'x' twice, as 0"),
    (
        "plan HERE/models.py:weighed --mesh dp=2 --batch-dim weight",
        "write INPUT=DIM, as in position_ids=1, or mask=none",
    ),
    ("plan MODEL --mesh dp=2 --hardware h100 --async-tp", "plan: --async-tp: every axis of {'dp': 2} splits the batch"),
    ("plan MODEL --mesh dp=2 --batch 8", "models.py:build returns its inputs; set them there"),
    ("search MODEL --gpus 2 --global-batch 8 --seq 8", "models.py:build returns its inputs; set them there"),
    ("plan MODEL --mesh dp=2 --layers 2", "models.py:build makes its own layers"),
    ("plan LLAMA3-8B --mesh dp=2", "did you mean llama3-8b"),
    ("plan HERE/none/config.json --mesh dp=2", "none/config.json: no such file"),
    ("plan HERE/heads --mesh dp=2", "not a multiple of the number of attention heads"),
    ("plan MODEL --mesh dp=2 --memory-budget .", "is no size"),
    ("plan MODEL --mesh dp=2 --memory-budget 0", "is nothing"),
    (f"plan MODEL --mesh dp=2 --memory-budget {'9' * 400}", "9' is more than a device has; write bytes, or 80GiB"),
    (f"plan MODEL --mesh dp=2 --accumulate {'9' * 400}", "9' is no positive whole number of at most 18 digits"),
    ("plan HERE/kindless.json --mesh dp=2", "'model_type' is 5; the name of an architecture is wanted"),
    ("plan HERE/numbered.json --mesh dp=2", "'architectures' is [3]; a list of names of classes"),
    (
        "plan HERE/seeing.json --mesh dp=2 --seq 99",
        "--seq 99, but a ViTForImageClassification reads pixel_values, labels",
    ),
    ("plan HERE/wordless.json --mesh dp=2 --hardware h100", "the config of the LlamaForCausalLM has a vocab_size of 0"),
    ("plan HERE/clip.json --mesh dp=2", "a 'clip' is no causal language model"),
    ("plan HERE/models.py:Tiny --mesh dp=2", "its forward takes ids, labels"),
    ("plan HERE/models.py:three --mesh dp=2", "returned a tuple of 3"),
    ("plan MODEL --mesh dp=2 --param-dtype int8", "is none of bfloat16"),
    ("plan MODEL --from HERE/bytes.json", "bytes.json: not a text"),
    ("plan MODEL --from HERE/deep.json", "deep.json: not JSON (nested too deep)"),
    ("plan MODEL --mesh dp=2 --hardware HERE/deep.json", "is not JSON: nested too deep"),
    ("plan HERE/deep.json --mesh dp=2", "deep.json: no JSON (nested too deep)"),
    ("diff HERE/plan.json --measured HERE/deep.json", "deep.json: not JSON (nested too deep)"),
    ("verify MODEL --mesh dp=2 --tolerance -1", "is no relative error"),
    ("plan HERE --mesh dp=2", "without a config.json"),
    ("plan HERE/plan.json --mesh dp=2", "no 'model_type'"),
    ("plan gpt3-175b --mesh dp=2 --seq 4096", "the model has 2048 positions"),
    ("plan MODEL --mesh dp=2 --hardware h100 -o HERE/none/plan.json", "none/plan.json: no folder"),
    ("diff HERE/plan.json HERE/none.json", "none.json: No such file"),
    ("diff HERE/plan.json HERE/models.py", "not JSON"),
    ("diff HERE/plan.json HERE/plan.json --max-regression lots", "is no share"),
    ("check HERE/plan.json nope", "no model 'nope'"),
    ("explain HERE/plan.json zzz", "nothing in the plan matches 'zzz'; its parameters are embed.weight"),
    ("explain HERE/plan.json up.weight --model HERE/models.py:wider", "name the model that it was made for"),
    ("verify MODEL", "pass --mesh"),
    ("verify MODEL --mesh dp=4 --plan HERE/plan.json", "the plan is for the mesh"),
    ("verify MODEL --plan HERE/plan.json --recompute full --pin *=R", "--recompute, --pin: "),
    ("verify HERE/models.py:wider --plan HERE/plan.json", "the plan is for the graph"),
    ("search MODEL --gpus 12 --global-batch 12 --hardware h100", "12 GPUs fill no whole number of nodes"),
    ("search MODEL --gpus 100 --global-batch 100 --hardware h100", "nodes of 8; use 96 or 104"),
    ("search MODEL --gpus 6400000000 --global-batch 6400000000", "are 6,400,000,000 GPUs; meshes of at most 2,147,"),
    ("search MODEL --global-batch 8", "required: --gpus"),
    ("search MODEL --gpus 8 --global-batch 1 --hardware h100 --html HERE/none/x.html", "none/x.html: no folder"),
    ("price MODEL --gpus 6400000000 --global-batch 6400000000", "price: there are 6,400,000,000 GPUs; meshes of at m"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --tp 3", "--gpus 8 is no multiple of --tp 3 x --pp 1"),
    ("price MODEL --gpus 8 --global-batch 12 --hardware h100", "is no multiple of 8 data-parallel ranks x --micro-bat"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --replicas 3", "does not divide the 8 data-parallel ranks"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --replicas 2 --state zero1", "--replicas 2: copies of"),
    ("price MODEL --gpus 8 --global-batch 4 --hardware h100 --pp 2", "price: --pp 2, but no repeated layers were"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --measured 0", "'0' is no time; write seconds, as in 2.5"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware a100-80gb --fp8", "has no fp8 matrix products"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware a100-80gb --fp8", "price: --fp8: a100-80gb has no fp8"),
    (
        "price MODEL --gpus 8 --global-batch 8 --hardware h100 --whole-layers",
        "--whole-layers, but --recompute poi",
    ),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --balanced-stages", "--balanced-stages, but --pp 1"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --experts-beside", "--experts-beside, but --ep 1"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --dispatcher deepep", "--dispatcher deepep, but --ep 1;"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --experts-cut", "--experts-cut, but --ep 1; tensor-par"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --ends-count", "--ends-count, but --pp 1; there are no"),
    (
        "price MODEL --gpus 8 --global-batch 8 --hardware h100 --state zero1 --keep-gathered",
        "--keep-gathered, but --st",
    ),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --tp-collectives waited", "--tp-collectives waited, but -"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --tp-collectives parts", "--tp-collectives parts, but --t"),
    (
        "price MODEL --gpus 8 --global-batch 8 --hardware h100 --state-collectives waited",
        "--state-collectives waited, but --state zero3",
    ),
    (
        "price MODEL --gpus 8 --global-batch 8 --hardware h100 --state zero0 --state-collectives gradients",
        "--state-collectives gradients, but --state zero0",
    ),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --regather-activations", "--regather-activations, but --t"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --no-sequence-parallel", "--no-sequence-parallel, but --t"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --ep 2", "--ep 2, but the model has no routed experts"),
    ("price MODEL --gpus 8 --global-batch 8 --hardware h100 --state zero3 --ep 2", "--ep 2, but the model has no"),
    ("price MODEL --gpus 8 --global-batch 8 --batch-dim x=0 --batch-dim x=1", "--batch-dim names 'x' twice, as 0 and"),
    ("price MODEL --gpus 8 --global-batch 8 --state zero5", "choose from"),
    ("price MODEL --gpus 8 --hardware h100", "required: --global-batch"),
    ("calibrate --seconds 0", "--seconds 0"),
    ("calibrate --seconds nan", "--seconds nan"),
    ("calibrate --seconds inf", "--seconds inf"),
    ("calibrate --device tpu", "device is 'tpu'; cpu and cuda can be measured"),
    ("calibrate --device cuda:99", "device is 'cuda:99', but torch sees"),
    ("calibrate --from-trace HERE/step.json", "needs --plan PLAN"),
    ("calibrate --from-trace HERE/step.json --plan HERE/plan.json --ranks 2", "--ranks: with --from-trace nothing is"),
    ("explain HERE/plan.json up.weight --layers 2", "--layers 2 goes with --model MODEL"),
    ("calibrate --plan HERE/plan.json", "go with --from-trace"),
    ("diff HERE/plan.json", "give two plans, or one plan and --measured TRACE"),
    ("diff HERE/plan.json --measured HERE/plan.json", "no traceEvents"),
    ("calibrate --from-trace HERE/step.json --plan HERE/plan.json", "a trace without ops or kernels"),
    ("plan MODEL --mesh dp=2 -o HERE/a.json --html HERE/a.json", "--html and --output are one file"),
    ("plan MODEL --mesh dp=2 --eject HERE/models.py", "models.py:build) are one file"),
    ("plan MODEL --from HERE/plan.json --html HERE/plan.json", "--html and --from ("),
    ("plan MODEL --mesh dp=2 --hardware HERE/hardware.json -o HERE/hardware.json", "--output and --hardware ("),
    ("search MODEL --gpus 2 --global-batch 2 --html HERE/models.py", "models.py:build) are one file"),
    ("check HERE/plan.json MODEL -o HERE/models.py", "models.py:build) are one file"),
    ("calibrate --from-trace HERE/a --plan HERE/plan.json -o HERE/a", "--output and --from-trace"),
    ("plan MODEL --mesh dp=2 --html HERE", "a folder; name a file"),
    ("calibrate --seconds 1 -o HERE/none/hardware.json", "no folder"),
    ("plan MODEL --mesh dp=2 --hardware h100 -o /dev/full", "--output: cannot write /dev/full: No space left"),
    ("plan MODEL --mesh dp=2 --hardware h100 --html /dev/full", "--html: cannot write /dev/full: No space left"),
    ("plan MODEL --mesh dp=2 --hardware h100 --trace /dev/full", "--trace: cannot write /dev/full: No space left"),
    ("plan MODEL --mesh dp=2 --hardware h100 --eject /dev/full", "--eject: cannot write /dev/full: No space left"),
    ("check HERE/plan.json MODEL -o /dev/full", "--output: cannot write /dev/full: No space left"),
    ("search MODEL --gpus 1 --global-batch 1 --hardware h100 --html /dev/full", "--html: cannot write /dev/full: No"),
    ("plan MODEL --mesh dp=2 --memory-budget -5GiB", "argument --memory-budget: '-5GiB' is no size; write bytes"),
    ("plan MODEL --mesh dp=2 --memory-budget -.5", "argument --memory-budget: '-.5' is no size; write bytes, or 80GiB"),
    ("plan MODEL --mesh dp=2 --batch -1", "argument --batch: '-1' is no positive whole number"),
]


@pytest.mark.parametrize(("call", "told"), MISTAKES, ids=[call for call, _ in MISTAKES])
def test_a_mistake_is_one_line_on_standard_error(
    here: Here, call: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = call.replace("MODEL", here.model).replace("HERE", str(here.folder)).split()
    assert main(words) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("autopar")
    assert told in lines[0]


def test_an_input_that_all_samples_share_is_named_by_a_flag(here: Here) -> None:
    """Its product with the rows of two ranks is of 8 x 8 by 8 x 3, where 16 x 3 would be no operand."""
    model, flags = f"{here.folder}/models.py:weighed", ("--mesh", "dp=2", "--batch-dim", "weight=none", "--json")
    kept = here.folder / "weighed.json"
    planned = autopar("plan", model, *flags, "--hardware", "h100", "-o", kept)
    assert planned.code == 0, planned.err
    assert planned.json["options"]["batch_dims"] == {"weight": None}
    again = autopar("plan", model, "--from", kept, "--batch-dim", "x=0", "--json")
    assert again.json["options"]["batch_dims"] == {"weight": None, "x": 0}
    assert autopar("verify", model, *flags, "--hardware", "h100").json["ok"]
    rows = autopar("inspect", model, *flags).json["operations"]
    assert 2 * 8 * 8 * 3 in [row["flops"] for row in rows if row["shape"] == [8, 3]]
    # Commands that read a kept plan have it from there.
    assert autopar("check", kept, model).code == 0
    assert autopar("explain", kept, "up.weight", "--model", model).code == 0


def test_a_search_takes_the_flag_too(here: Here) -> None:
    """Its 4 x 3 rows for each of two ranks, or 8 x 3 on one, where a part of the weight would be no operand."""
    model, page = f"{here.folder}/models.py:weighed", here.folder / "weighed.html"
    call = ("search", model, "--gpus", 2, "--global-batch", 8, "--hardware", "h100", "--html", page)
    unclear = autopar(*call)
    assert unclear.code == 2
    assert "--batch-dim weight=0" in unclear.err
    found = autopar(*call, "--batch-dim", "weight=none", "--json")
    assert found.code == 0, found.err
    meshes = [candidate["mesh"] for candidate in found.json["candidates"]]
    assert {"dp_replicate": 2} in meshes
    assert {"tp": 2} in meshes
    assert "weight" in page.read_text(encoding="utf-8")


def test_what_a_users_function_prints_is_no_part_of_the_output(here: Here) -> None:
    ran = autopar("inspect", f"{here.folder}/models.py:talks", "--mesh", "dp=2", "--json")
    assert ran.code == 0
    assert ran.json["parameters"] > 0
    assert "made by hand" in ran.err


def test_a_class_that_transformers_lacks_is_told(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    file = here.folder / "own.json"
    file.write_text(json.dumps({"model_type": "llama", "architectures": ["MyLlama"], **sizes}), encoding="utf-8")
    assert main(["inspect", str(file), "--mesh", "dp=2", "--seq", "16"]) == 0
    assert "transformers has no MyLlama" in capsys.readouterr().out


def test_a_mistake_in_a_process_is_no_traceback(here: Here) -> None:
    ran = autopar("plan", f"{here.folder}/models.py:fails", "--mesh", "dp=2")
    assert ran.code == 2
    assert ran.out == ""
    line = next(i for i, text in enumerate(MODELS.splitlines(), 1) if ".nothing" in text)
    assert f"models.py:{line}: AttributeError" in ran.err
    assert "Traceback" not in ran.err


def test_closed_standard_output_is_no_traceback(here: Here) -> None:
    command = [sys.executable, "-m", "autopar", "diff", str(here.plan), str(here.plan)]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    ran = subprocess.run(closed, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_closed_standard_error_hides_stages_and_mistakes_alone(
    here: Here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["inspect", f"{here.folder}/models.py:build", "--mesh", "dp=2"]
    assert main(command) == 0
    told = capsys.readouterr().out
    for words, code, out in ((command, 0, told), (["inspect", "nothing", "--mesh", "dp=2"], 2, "")):
        monkeypatch.setattr(sys, "stderr", None)
        assert main(words) == code
        assert capsys.readouterr().out == out


def test_what_does_not_fit_is_told_in_flags() -> None:
    told = (
        "the smallest found (fsdp, recompute 'pointwise') needs 3 GiB. What conflicts: the memory budget of 2 GiB, "
        "strategy='fsdp' and pins={'layers.*.up': 'S(0)S(0) -> RS(0)'}; any one less would do. What would fit: without "
        "pins={'layers.*.up': 'RS(0)'}: 1 GiB, 3 ms per step (fsdp, recompute='full'); mesh={'dp': 2, 'tp': 8}: 1 GiB; "
        "memory_budget=3758096384 (3.5 GiB), if the device has that much."
    )
    assert with_flags(told, FLAGS) == (
        "the smallest found (fsdp, recompute 'pointwise') needs 3 GiB. What conflicts: the memory budget of 2 GiB, "
        "--strategy fsdp and --pin 'layers.*.up=S(0)S(0) -> RS(0)'; any one less would do. What would fit: without "
        "--pin 'layers.*.up=RS(0)': 1 GiB, 3 ms per step (fsdp, --recompute full); --mesh dp=2,tp=8: 1 GiB; "
        "--memory-budget 3758096384 (3.5 GiB), if the device has that much."
    )


def test_what_is_no_parameter_of_the_command_stays_as_it_is() -> None:
    told = "Options(batch_dims={name: dim}), Options(seed=3), cp=2 and reshard=True, but reshard=False"
    assert with_flags(told, {"batch_dims": "--batch-dim", "reshard=False": "--keep-gathered"}) == told.replace(
        "reshard=False", "--keep-gathered"
    )
