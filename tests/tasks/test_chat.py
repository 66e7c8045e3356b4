"""The form of lm-eval's prompts: plain or a chat, of a task or of a whole sweep."""

import copy
import json

import pytest

from kvbench.measured import prompt_forms
from kvbench.runners.toy import ToyRunner
from kvbench.sweep.config import parse_sweep
from kvbench.sweep.plan import plan, unsuited
from kvbench.tasks import make_task

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = {"task": "gsm8k", "num_fewshot": 2, "limit": 1, "apply_chat_template": True}


@pytest.fixture
def runner():
    """A toy model with a chat template, that keeps the prompts which it is asked."""

    class Listening(ToyRunner):
        prompts: list[str]

        def generate(self, requests, progress=None):
            self.prompts = [self.tokenizer.decode(request.prompt) for request in requests]
            return super().generate(requests, progress)

    made = Listening()
    made.tokenizer = copy.deepcopy(made.tokenizer)
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    ("options", "users", "system"),
    [
        ({}, 3, None),
        ({"fewshot_as_multiturn": False}, 1, None),
        ({"system_instruction": "Be brief."}, 3, "Be brief."),
        ({"apply_chat_template": False, "system_instruction": "Be brief."}, 0, "Be brief."),
    ],
    ids=["turns", "one turn", "system", "plain with an instruction"],
)
def test_a_chat_is_lm_evals(options, users, system, mirror, runner, context):
    """
    Few-shot examples are turns of a chat, or stand in its one turn; an instruction is the system's turn, or begins a
    plain prompt.
    """
    make_task(CHAT | options, mirror).run(runner, context)

    (prompt,) = runner.prompts
    assert prompt.count("<user>") == users
    assert prompt.endswith("<assistant>") == bool(users)
    assert prompt.count("What is 1 + 1?") == 2
    if system:
        assert prompt.startswith(f"<system>{system}</system>" if users else system)
    else:
        assert "<system>" not in prompt


def test_each_form_is_an_identity_and_the_default_adds_nothing(mirror):
    """
    What decides a prompt is in the identity; what says the default is left out of it, as for cells of before.
    """

    def identity(**options):
        return json.dumps(make_task({"task": "gsm8k", **options}, mirror).identity(), sort_keys=True)

    chat = {"apply_chat_template": True}
    assert identity() == identity(fewshot_as_multiturn=False) == identity(system_instruction="")
    assert not {"fewshot_as_multiturn", "system_instruction"} & set(json.loads(identity()))
    assert identity(**chat) == identity(**chat, fewshot_as_multiturn=True)
    forms = [{}, chat, chat | {"fewshot_as_multiturn": False}, chat | {"system_instruction": "x"}]
    assert len({identity(**form) for form in [*forms, {"system_instruction": "x"}]}) == 5


def test_plain_and_chat_live_in_one_sweep(mirror):
    """
    A task's plain and chat entries have names of their own, and no cell of one can be compared with one of the other.
    """
    text = (
        f"{{name: t, model: smollm2-135m-instruct, dtypes: [int8], data: {mirror}, tasks: [gsm8k, {json.dumps(CHAT)}]}}"
    )

    cells = plan(parse_sweep(text, "t.yaml"))

    assert [cell.task.name for cell in cells[:2]] == ["gsm8k", "gsm8k-chat"]
    keys = {
        name: {json.dumps(cell.identity["task"]) for cell in cells if cell.task.name == name}
        for name in ("gsm8k", "gsm8k-chat")
    }
    assert [len(keys[name]) for name in keys] == [1, 1]
    assert keys["gsm8k"].isdisjoint(keys["gsm8k-chat"])
    assert prompt_forms((cell.task.name, cell.identity["task"]) for cell in cells) == [
        "prompts of lm-eval's tasks: plain (gsm8k); in the model's chat template (gsm8k-chat)"
    ]


def test_a_sweeps_form_is_that_of_lm_evals_tasks_which_say_none(mirror):
    """
    The sweep's keys reach lm-eval's tasks, a task's own word wins, and kvbench's own tasks have no such option.
    """
    text = f"""
name: t
model: smollm2-135m-instruct
dtypes: [int8]
data: {mirror}
apply_chat_template: true
fewshot_as_multiturn: false
system_instruction: Be brief.
tasks: [arc_easy, {{task: gsm8k, apply_chat_template: false, system_instruction: ""}}, divergence]
"""
    sweep = parse_sweep(text, "t.yaml")

    assert prompt_forms((task.name, task.identity()) for task in sweep.make_tasks()) == [
        "prompts of lm-eval's tasks: in the model's chat template, few-shot examples in one turn, "
        'after "Be brief." (arc_easy-chat); plain (gsm8k)'
    ]


def test_a_model_without_a_template_is_refused(mirror, context):
    """
    A chat with a model that has no template is told by the plan, and by the task before it asks anything.
    """
    refused = "model toy has no chat template: leave out apply_chat_template, or use an instruct model"
    with pytest.raises(ValueError, match=refused):
        make_task(CHAT, mirror).run(ToyRunner(), context)

    text = f"{{name: t, model: gemma3-270m, dtypes: [int8], data: {mirror}, tasks: [gsm8k, {json.dumps(CHAT)}]}}"
    assert [line.split(":")[0] for line in unsuited(plan(parse_sweep(text, "t.yaml")))] == ["task gsm8k-chat"]


def test_turns_without_a_chat_are_refused(mirror):
    """
    `fewshot_as_multiturn: true` means nothing in a plain prompt.
    """
    with pytest.raises(ValueError, match=r"task gsm8k: .*needs apply_chat_template: true"):
        make_task({"task": "gsm8k", "fewshot_as_multiturn": True}, mirror)
