"""Our lm-eval model against lm-eval's own HFLM, on a tiny random Llama through the exact cache."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from kvbench.runners.base import ModelInfo, Score, Scores
from kvbench.runners.toy import ToyRunner, toy_tokenizer
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.tasks.runner_lm import RunnerLM

MAX_LENGTH = 64

PAIRS = [
    ("The cat sat on", " the mat"),
    ("trailing space ", "moves over"),
    ("", "no context at all"),
    ("", "<s> bos already"),
    ("<s>begins with bos", " here"),
    ("One question", " a"),
    ("One question", " b"),
    ("x" * 100, " longer than the model takes, cut from the left"),
    ("exactly as long " * 3, "y" * 17),
]
TEXTS = ["short", "a text of several windows, which the model cannot hold at once: " * 4, "z" * 64, "z" * 65]
PROMPTS = [
    ("Tell me", {"until": ["e", "\n"], "max_gen_toks": 20}),
    ("Tell me more", {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
    ("<s>bos first", {"until": "a", "max_gen_toks": 8}),
    ("cut from the left " * 6, {"until": ["q"], "max_new_tokens": 10}),
]


def tokenizer(adds_bos):
    made = copy.deepcopy(toy_tokenizer())
    made.pad_token = made.eos_token
    if adds_bos:
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = template
    return made


@pytest.fixture(params=[False, True], ids=["plain", "adds-bos"])
def models(request, tiny_llama):
    """HFLM and our model over the same weights and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    spelled = tokenizer(request.param)
    model = tiny_llama(spelled, MAX_LENGTH)
    theirs = HFLM(pretrained=model, tokenizer=spelled, batch_size=4, max_length=MAX_LENGTH)
    info = ModelInfo("tiny", "random", "float32", ((2, 8), (2, 8)), MAX_LENGTH)
    ours = RunnerLM(TransformersModel(model, spelled, info).runner(Scheme.parse("auto")))
    return theirs, ours


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_loglikelihoods_are_hflms(models):
    """
    Contexts that are empty, begin with bos, end in a space or are too long score as in HFLM, and greedy agrees.
    """
    theirs, ours = (model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for model in models)

    for (logprob, greedy), (our_logprob, our_greedy) in zip(theirs, ours, strict=True):
        assert our_logprob == pytest.approx(logprob, abs=1e-4)
        assert our_greedy == greedy


def test_rolling_loglikelihoods_are_hflms(models):
    """
    Whole texts, in windows where they are longer than the model, score as in HFLM.
    """
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    theirs, ours = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in models)

    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-4)


def test_generations_are_hflms(models):
    """
    Stop strings, limits, truncation and the end token give HFLM's text.
    """
    requests = instances("generate_until", PROMPTS)
    theirs, ours = (model.generate_until(copy.deepcopy(requests), disable_tqdm=True) for model in models)

    assert ours == theirs
    assert any(ours)
    assert models[1].truncated == 1


@pytest.mark.parametrize("length", [1, 5, 16, 17, 33, 50])
def test_rolling_windows_score_each_token_once(length):
    """
    A rolling score is the sum over windows of each token's log-probability with all that its window holds before it.
    """
    runner = ToyRunner(max_length=16)
    text = ("quick brown foxes and lazy dogs, " * 2)[:length]
    tokens = [runner.tokenizer.bos_token_id, *runner.tokenizer.encode(text)]

    expected, first = 0.0, 0  # brute force: the first window starts at bos, the next each hold the last 16 inputs
    while first < length:
        last = min(first + 16, length)
        inputs = tokens[max(0, last - 16) : last]
        log_probs = runner.log_probs(runner.hidden_states([inputs])[0])[-(last - first) :]
        expected += float(log_probs[torch.arange(last - first), torch.tensor(tokens[first + 1 : last + 1])].sum())
        first = last

    (got,) = RunnerLM(runner).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert got == pytest.approx(expected, abs=1e-3)


def test_sampled_generations_differ_by_seed_and_repeat():
    """
    Sampling draws by the sweep's seed and the request's place: the same again, another for the next repeat.
    """
    request = ("Say", {"do_sample": True, "temperature": 5.0, "max_gen_toks": 20, "until": []})
    requests = instances("generate_until", [request, request])

    first, again, other = (RunnerLM(ToyRunner(), seed=seed).generate_until(requests) for seed in (1, 1, 100))

    assert first == again != other
    assert first[0] != first[1]


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"repetition_penalty": 1.2}])
def test_a_generation_option_that_is_not_offered_is_refused(options):
    """
    Nothing that decides a generation is dropped silently.
    """
    with pytest.raises(ValueError, match="not offered"):
        RunnerLM(ToyRunner()).generate_until(instances("generate_until", [("Say", {"until": [], **options})]))


def test_a_chat_template_without_system_turns_is_used_without_them():
    """
    A template that refuses a system turn gets the conversation without it.
    """
    runner = ToyRunner()
    runner.tokenizer = copy.deepcopy(runner.tokenizer)
    runner.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    assert RunnerLM(runner).apply_chat_template(history) == "<user>Hi<assistant>"


def test_rows_are_summed_together_as_each_alone():
    """
    Log-probabilities of all magnitudes have the sum, to the bit, that each row has by itself.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [-(torch.rand(1 + 7 * i % 40, generator=generator) ** 20) * 60 for i in range(300)]

    scores = Scores.of([Score(row, len(row) > 3) for row in rows])

    assert scores.sums() == [float(row.double().sum()) for row in rows]
    assert [score.greedy for score in scores] == [len(row) > 3 for row in rows]
    assert all(score.logprobs.equal(row) for score, row in zip(scores, rows, strict=True))
    assert Scores.of(scores) is scores
    assert [score.greedy for score in scores[-2:]] == [scores[len(rows) - 2].greedy, scores[-1].greedy]
    assert Scores.of([]).sums() == []
