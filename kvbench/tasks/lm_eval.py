"""lm-eval's tasks by name: its prompts, metrics and filters over a runner, with data from the hub or a folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache, partialmethod
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from kvbench.results import LM_EVAL, Metric, Outcome, exponential, headline, of_lm_eval
from kvbench.tasks import documents, lm_eval_index, mirror, text
from kvbench.tasks.base import LETTERS_PER_TOKEN, NamedPath, Need, Options, RunContext, Text, Texts, Work, no_template

if TYPE_CHECKING:
    from kvbench.runners.base import Runner
    from kvbench.tasks.runner_lm import Encoded

# lm-eval's own seeds, so that its few-shot examples are ours
RANDOM_SEED, OTHER_SEED = 0, 1234
BOOTSTRAP_REPEATS = 1000  # of lm-eval's bootstrap (for a perplexity's error); its 100 000 take minutes
UNITS = {name: known["unit"] for name, known in LM_EVAL.items() if "unit" in known}  # no plain means
MEANS = ("acc", "acc_norm", "exact_match")  # what lm-eval averages where a task does not say how
NOT_MEASURED = -1.0  # what RULER's tasks say of lengths that were not asked for
MAX_GEN_TOKS = 256  # lm-eval's, where a task does not say
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class LmEval(Options):
    """One of lm-eval's tasks, groups or tags."""

    task: str
    """Its name in `kvbench ls tasks`."""
    num_fewshot: Annotated[int, Field(ge=0, le=10**6)] | None = None
    """Examples before each question; without it the task's own number."""
    apply_chat_template: bool = False
    """Ask as a chat, in the model's template."""
    fewshot_as_multiturn: bool | None = None
    """A chat's few-shot examples are turns of it, unless this is false."""
    system_instruction: str | None = None
    """What stands before each prompt."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """For tasks that make their own documents, such as `max_seq_lengths` for RULER, whose tokenizer is the model's."""
    data: NamedPath | None = None
    """The mirror's folder, for this task alone."""
    cluster: Annotated[str, Field(min_length=1)] | None = None
    """A field of its rows, such as `passage_id`: those that have it in common are compared as a cluster."""

    @model_validator(mode="after")
    def _turns_of_a_chat(self) -> Self:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn makes turns of a chat: it needs apply_chat_template: true")
        return self

    @property
    def _multiturn(self) -> bool:
        return self.apply_chat_template and self.fewshot_as_multiturn is not False

    def identity(self) -> dict[str, Any]:
        data: dict[str, str] = {}
        for leaf in self._leaves():
            leaf.check_shots(self.num_fewshot)
            if leaf.mirrored:
                place, files = leaf.mirrored
                data |= {f"{place}/{split}": mirror.digest(file) for split, file in files.items()}
        entries = lm_eval_index.closure(self.task).values()
        ours = any(entry.path and Path(entry.path).parent == lm_eval_index.OURS for entry in entries)
        return {
            "task": self.task,
            "lm_eval": lm_eval_index.version(),
            "yaml": {entry.name: lm_eval_index.digest(Path(entry.path)) for entry in entries if entry.path},
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
            # what is as ever is left out, so that no name of an earlier cell changes
            **({"fewshot_as_multiturn": False} if self.apply_chat_template and not self._multiturn else {}),
            **({"system_instruction": self.system_instruction} if self.system_instruction else {}),
            **({"cluster": self.cluster} if self.cluster else {}),
            "metadata": self.metadata,
            "data": data,
            **({"text_sha256": text.builtin().sha256} if ours else {}),
        }

    def missing(self) -> list[str]:
        found: dict[str, None] = {}
        for leaf in self._leaves():
            found |= dict.fromkeys(leaf.missing(self.num_fewshot))
        return list(found)

    def answers(self) -> int | None:
        sizes = [leaf.answers() for leaf in self._leaves()]
        if None in sizes:
            return None
        return sum(min(size, self.limit or size) for size in sizes if size is not None)

    def work(self) -> Work | None:
        works = [leaf.work(self.num_fewshot, self.limit) for leaf in self._leaves()]
        known = [work for work in works if work]
        if not known or len(known) < len(works):
            return None
        return Work(
            sum(work.prompt_tokens for work in known),
            sum(work.answers for work in known),
            max(work.answer_tokens for work in known),
        )

    def needs(self) -> frozenset[Need]:
        found: set[Need] = {"tokenizer", "chat template"} if self.apply_chat_template else {"tokenizer"}
        if any(leaf.config.get("output_type", "generate_until") == "generate_until" for leaf in self._leaves()):
            found.add("generation")
        return frozenset(found)

    def metrics(self) -> tuple[str, ...] | None:
        leaves = self._leaves()
        # which metrics a group takes from its tasks is lm-eval's to say
        alone = len(leaves) == 1 and leaves[0].name == self.task
        return leaves[0].metrics() if alone else None

    def run(self, runner: Runner, context: RunContext) -> Outcome:
        """lm-eval's metrics and a row for each document and filter.

        Where lm-eval gives a perplexity over words or bytes no standard error, it is a bootstrap's over documents.

        Raises:
            ValueError: data that is not there, a row that the task cannot read, as `file:line: what is wrong`, or a
                chat with a model that has no template for one.
        """
        import jinja2
        from lm_eval.evaluator import evaluate

        from kvbench.tasks.draws import drawn_at_once
        from kvbench.tasks.runner_lm import RunnerLM

        lacking = self.missing()
        if lacking:
            raise ValueError("; ".join(lacking))
        if self.apply_chat_template and not getattr(runner.tokenizer, "chat_template", None):
            raise ValueError(no_template(runner.info.name))
        identity = json.dumps(self.identity(), sort_keys=True)
        once = _compiled_once(), documents.written_once(), drawn_at_once(), _loaded_tokenizer(runner.tokenizer)
        with _quiet(), _seeded(), _unbounded(), contextlib.ExitStack() as stack:
            for one in once:
                stack.enter_context(one)
            loaded, encoded = _load(self.model_dump_json(), identity, runner.tokenizer)
            stack.enter_context(documents.without_softmax(loaded["tasks"].values()))
            model = RunnerLM(runner, context.progress, context.seed, encoded)
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=OTHER_SEED)
            try:
                results = evaluate(
                    lm=model,
                    task_dict=loaded,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAP_REPEATS,
                    apply_chat_template=self.apply_chat_template,
                    fewshot_as_multiturn=self._multiturn,
                    system_instruction=self.system_instruction or None,
                )
            except (jinja2.UndefinedError, LookupError, TypeError, ValueError, AttributeError) as error:
                for leaf in self._leaves():
                    leaf.raise_broken_row(loaded["tasks"], error)
                raise
        with _unbounded():
            return self._outcome(loaded, results, model.truncated)

    def texts(self) -> Texts:
        """See Task; for a chat or a task with code of its own too, but not where documents are made by a tokenizer."""
        from lm_eval.utils import handle_non_serializable, hash_string

        if lacking := self.missing():
            raise ValueError("; ".join(lacking))
        found: Texts = {}
        with _quiet(), _seeded(), _compiled_once():
            loaded, _ = _load(self.model_dump_json(), json.dumps(self.identity(), sort_keys=True), None)
            for name, task in loaded["tasks"].items():
                for number, doc in islice(enumerate(task.eval_docs), self.limit):
                    whole = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
                    choices = _choices(task, doc)
                    target = task.doc_to_target(doc)
                    right = choices[target] if choices and isinstance(target, int) else str(target)
                    digest = hash_string(whole)
                    found[name, str(number)] = Text(_asked(task, doc, choices), right.strip(), choices, digest)
        return found

    def _outcome(self, loaded: dict[str, Any], results: dict[str, Any], truncated: int) -> Outcome:
        rows = {
            name: [_sample(name, row, loaded["tasks"][name], self.cluster) for row in rows]
            for name, rows in results["samples"].items()
        }
        metrics: list[Metric] = []
        # the task's or group's own numbers first, then those of what it holds
        for name in sorted(results["results"], key=lambda name: (name != self.task, name in rows)):
            leaves = [leaf for leaf in rows if leaf in lm_eval_index.closure(name)]
            n = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
            prefix = "" if name == self.task else f"{name}/"
            for metric, filter_name, value, stderr in _numbers(results["results"][name]):
                values = [row.get(metric) for leaf in leaves for row in rows[leaf]]
                if value == NOT_MEASURED and set(values) == {NOT_MEASURED}:
                    for leaf in leaves:
                        rows[leaf] = [{key: cell for key, cell in row.items() if key != metric} for row in rows[leaf]]
                    continue
                if stderr is None:
                    stderr = _ratio_stderr(rows.get(name, []), metric, value)
                label = metric if filter_name == "none" else f"{metric},{filter_name}"
                better = {results["higher_is_better"][leaf].get(metric) for leaf in leaves}
                higher = better.pop() if len(better) == 1 else None
                known = {"higher_is_better": higher, **of_lm_eval(metric, higher)}
                # a group's own numbers stand for those of its tasks
                shown = known.get("headline", True) and not (prefix and metrics and "/" not in metrics[0].name)
                metrics.append(Metric(prefix + label, value, stderr, n, **{**known, "headline": shown}))
        samples = [row for task_rows in rows.values() for row in task_rows]
        hashes = [[row["task"], row["doc_id"], row["filter"], row["doc_hash"], row["prompt_hash"]] for row in samples]
        facts = {
            "lm_eval": lm_eval_index.version(),
            "documents_sha256": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
            "documents": len({(row["task"], row["doc_id"]) for row in samples}),
            "truncated_requests": truncated,
            "num_fewshot": results["n-shot"],
            "versions": results["versions"],
            "data": {leaf.name: leaf.source for leaf in self._leaves()},
        }
        return Outcome(tuple(metrics), samples, facts)

    def _leaves(self) -> list[_Leaf]:
        entries = lm_eval_index.closure(self.task).values()
        return [
            _Leaf(entry.name, Path(entry.path), self.data) for entry in entries if entry.kind == "task" and entry.path
        ]


class _Leaf:
    """One task of lm-eval, and where its rows are. mirrored: its folder in the mirror, and the files by split."""

    def __init__(self, name: str, path: Path, data: Path | None) -> None:
        self.name = name
        self.path = path
        self.config = lm_eval_index.config(path)
        self.from_hub = (
            bool(self.config.get("dataset_path"))
            and "custom_dataset" not in self.config
            and "data_files" not in (self.config.get("dataset_kwargs") or {})
        )
        self.mirrored = (
            mirror.find(data, self.config["dataset_path"], self.config.get("dataset_name")) if self.from_hub else None
        )

    @property
    def source(self) -> str:
        """Where its rows come from, as a record says it."""
        if self.mirrored:
            return f"mirror: {self.mirrored[0]}"
        if self.from_hub:
            return f"hub: {self.config['dataset_path']}/{self.config.get('dataset_name') or 'default'}"
        return "the task itself"

    def needed_splits(self, num_fewshot: int | None) -> list[str]:
        """The split that is scored, and the one that few-shot examples come from."""
        scored = self._scored
        if not self.shots(num_fewshot) or "samples" in (self.config.get("fewshot_config") or {}):
            return [scored] if scored else []
        return list(dict.fromkeys(filter(None, (scored, self._shown))))

    @property
    def _scored(self) -> str | None:
        split: str | None = self.config.get("test_split") or self.config.get("validation_split")
        return split

    @property
    def _named(self) -> str | None:
        """The split that the task names for few-shot examples."""
        split: str | None = self.config.get("fewshot_split") or (self.config.get("fewshot_config") or {}).get("split")
        return split

    @property
    def _shown(self) -> str | None:
        """The split that few-shot examples come from."""
        first: str | None = self.config.get("training_split") or self.config.get("validation_split")
        return self._named or first or self._scored

    def shots(self, num_fewshot: int | None) -> int:
        """How many few-shot examples a prompt has."""
        own = self.config.get("num_fewshot")
        # lm-eval lets a task that says 0 keep it
        return own or 0 if num_fewshot is None or own == 0 else num_fewshot

    def check_shots(self, num_fewshot: int | None) -> None:
        """Raises ValueError for more examples than there are, as far as the task or a mirror's file says."""
        samples = (self.config.get("fewshot_config") or {}).get("samples")
        if isinstance(samples, list):
            there, where = len(samples), "the task itself"
        elif samples is None and self.mirrored and (file := self.mirrored[1].get(self._shown or "")):
            # a document that is scored is no example of its own, and lm-eval draws one more
            own = self._named == self.config.get("test_split")
            there, where = len(mirror.rows(file)) - own, f"the split {self._shown}"
        else:
            return
        if (shots := self.shots(num_fewshot)) > there:
            raise ValueError(f"task {self.name}: num_fewshot {shots}, and {where} has {there} examples")

    def answers(self) -> int | None:
        """Rows of the scored split in the mirror; None without one, and where a text is scored instead of answers."""
        if self.config.get("output_type") == "loglikelihood_rolling":
            return None
        scored = self.needed_splits(0)
        file = self.mirrored[1].get(scored[0]) if self.mirrored and scored else None
        return len(mirror.rows(file)) if file else None

    def work(self, num_fewshot: int | None, limit: int | None) -> Work | None:
        """By the letters of its rows in the mirror: prompts are not made, and a row is about what a prompt shows of it.

        Where choices are scored, what they share is read once.
        """
        scored = self.needed_splits(0)
        file = self.mirrored[1].get(scored[0]) if self.mirrored and scored else None
        if file is None:
            return None
        rows = mirror.rows(file)
        if limit is not None:
            rows = rows[:limit]
        tokens = (1 + self.shots(num_fewshot)) * sum(map(_letters, rows)) / LETTERS_PER_TOKEN
        if self.config.get("output_type", "generate_until") != "generate_until":
            return Work(tokens)
        most = (self.config.get("generation_kwargs") or {}).get("max_gen_toks", MAX_GEN_TOKS)
        return Work(tokens, len(rows), int(most))

    def metrics(self) -> tuple[str, ...] | None:
        """Its headline metrics with their filters; None where the YAML leaves them, or how they sum up, to code."""
        listed = self.config.get("metric_list") or []
        if not listed or not all(_is_mean(one) for one in listed):
            return None
        filters = [one["name"] for one in self.config.get("filter_list") or [{"name": "none"}]]
        found = [
            Metric(one["metric"] if name == "none" else f"{one['metric']},{name}", 0, None, 0, **known)
            for one in listed
            for known in [of_lm_eval(one["metric"], one.get("higher_is_better"))]
            for name in filters
        ]
        return tuple(metric.name for metric in headline(found))

    def missing(self, num_fewshot: int | None) -> list[str]:
        """What its data lacks here."""
        if not self.from_hub:
            return []
        dataset, name = self.config["dataset_path"], self.config.get("dataset_name") or "default"
        wanted = self.needed_splits(num_fewshot)
        if self.mirrored:
            place, files = self.mirrored
            return [
                f"{self.name}: the data folder has no {place}/{split}.jsonl" for split in wanted if split not in files
            ]
        reason = mirror.hub_lacks(dataset)
        if reason is None:
            return []
        files_wanted = " and ".join(f"{dataset}/{name}/{split}.jsonl" for split in wanted)
        return [
            f"{self.name}: no data set {dataset} here, and {reason}: put {files_wanted} (the hub's rows) "
            "in the folder that `data:` or KVBENCH_DATA names"
        ]

    def redirect(self) -> dict[str, Any]:
        """What changes in the stock YAML so that rows come from the mirror."""
        if not self.mirrored:
            return {}
        _, files = self.mirrored
        absent = {key: None for key in SPLITS if self.config.get(key) and self.config[key] not in files}
        return {"dataset_kwargs": {"mirror_files": {split: str(file) for split, file in files.items()}}, **absent}

    def raise_broken_row(self, tasks: dict[str, Any], cause: Exception) -> None:
        """Raises a ValueError that names the first row of the mirror that the task cannot render, if there is one."""
        task = tasks.get(self.name)
        if task is None or not self.mirrored:
            return
        split = task.config.test_split or task.config.validation_split
        file = self.mirrored[1][split]
        for number, document in enumerate(task.eval_docs, 1):
            try:
                task.doc_to_text(document)
                task.doc_to_target(document)
                if task.config.doc_to_choice is not None:
                    task.doc_to_choice(document)
            except Exception as error:
                line = "" if task.config.process_docs is not None else f":{number}"
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"{file}{line}: {self.name} cannot read this row: {what}") from cause


def _letters(value: Any) -> int:
    """Letters of the texts in a row, whose other values a prompt seldom shows."""
    if isinstance(value, dict):
        return sum(map(_letters, value.values()))
    if isinstance(value, list):
        return sum(map(_letters, value))
    return len(value) if isinstance(value, str) else 0


@contextlib.contextmanager
def _loaded_tokenizer(tokenizer: Any) -> Iterator[None]:
    """RULER measures its documents with this tokenizer: by a name it would load another, and run code beside that."""
    from lm_eval.tasks.ruler import common_utils

    before = common_utils.AutoTokenizer
    common_utils.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    common_utils.get_tokenizer.cache_clear()  # it keeps them by their names
    try:
        yield
    finally:
        common_utils.AutoTokenizer = before
        common_utils.get_tokenizer.cache_clear()


@lru_cache(maxsize=8)
def _load(options: str, identity: str, tokenizer: Any) -> tuple[dict[str, Any], Encoded]:
    """What the cells of one model and task share: lm-eval's task objects, and the tokens of their texts.

    The objects keep their documents and requests. options: an LmEval as JSON; `identity` stands for the files behind.
    lm-eval scans a folder with no more than this task needs: each stock YAML, included, and redirected to the mirror.
    """
    from lm_eval.tasks import TaskManager

    from kvbench.tasks.runner_lm import Encoded

    task = LmEval.model_validate_json(options)
    entries = lm_eval_index.closure(task.task).values()
    leaves = {leaf.name: leaf for leaf in task._leaves()}
    with tempfile.TemporaryDirectory(prefix="kvbench-tasks-") as folder:
        for number, entry in enumerate(entry for entry in entries if entry.path):
            redirect = leaves[entry.name].redirect() if entry.name in leaves else {}
            lines = yaml.safe_dump({"include": entry.path, **redirect})
            if redirect:
                lines += "custom_dataset: !function kvbench.tasks.mirror.load\n"
            Path(folder, f"{number:05}.yaml").write_text(lines, encoding="utf-8")
        manager = TaskManager(
            include_path=folder,
            include_defaults=False,
            # a name, since RULER asks for one; `_loaded_tokenizer` is what it gets
            metadata={**task.metadata, "tokenizer": str(getattr(tokenizer, "name_or_path", "")) or "the model's own"},
        )
        loaded: dict[str, Any] = manager.load([task.task])
    for leaf in loaded["tasks"].values():
        preset = leaf.get_config("num_fewshot")
        if task.num_fewshot is not None and preset != 0:
            leaf.set_config(key="num_fewshot", value=task.num_fewshot)
        elif preset is None:
            leaf.set_config(key="num_fewshot", value=0)
        _check_examples(leaf)
        _build_once(leaf)
    return loaded, Encoded()


def _check_examples(task: Any) -> None:
    """Raises ValueError where lm-eval's task has fewer examples than its prompts are to show."""
    shots = task.get_config("num_fewshot")
    if not shots or not hasattr(task, "fewshot_cfg"):
        return
    docs = task.fewshot_docs()
    there = len(docs if hasattr(docs, "__len__") else list(docs))
    there -= task.fewshot_cfg.split == task.config.test_split  # as lm-eval decides whether to draw one more
    if shots > there:
        raise ValueError(f"task {task.config.task}: num_fewshot {shots}, and there are {there} examples")


def _build_once(task: Any) -> None:
    """lm-eval's task makes its documents and requests once; then it has the same ones, unanswered."""
    documents.keep(task)
    build = task.build_all_requests
    drawn: Any = None  # where the first time left the global generators

    def build_all_requests(**options: Any) -> None:
        nonlocal drawn
        if drawn is None:
            build(**options)
            drawn = _generators()
        _set_generators(drawn)
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = build_all_requests


def _choices(task: Any, doc: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, task.doc_to_choice(doc))) if task.OUTPUT_TYPE == "multiple_choice" else ()


def _asked(task: Any, doc: dict[str, Any], choices: Sequence[str]) -> str:
    """What a document asks; where the question lies in the choice, the choices."""
    asked = task.doc_to_text(doc)
    return choices[asked] if isinstance(asked, int) and choices else str(asked)


def _is_mean(metric: dict[str, Any]) -> bool:
    """Whether an entry of a `metric_list` sums up as a mean over documents, of the logarithm for a perplexity."""
    name, how = metric["metric"], metric.get("aggregation")
    if how is None:
        return name in UNITS or name in MEANS
    return name in UNITS or (how == "mean" and "higher_is_better" in metric)


def _numbers(result: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(metric, filter, value, stderr or None) of one task's or group's results."""
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = result.get(f"{metric}_stderr,{filter_name}")
        yield metric, filter_name, float(value), float(stderr) if isinstance(stderr, (int, float)) else None


def _sample(name: str, row: dict[str, Any], task: Any, cluster: str | None = None) -> dict[str, Any]:
    """A row without the document: hashes, what the model said, and one number a metric.

    `perplexity` is the log-likelihood, as in lm-eval's own records. A perplexity over words or bytes is the document's
    own; beside it stand `.logprob` and `.weight`, of which the sums make the task's.
    """
    said: dict[str, Any] = {}
    responses = [response[0] if isinstance(response, list) and response else response for response in row["resps"]]
    if all(isinstance(response, (tuple, list)) for response in responses):
        said = {
            "logprobs": [float(logprob) for logprob, _ in responses],
            "greedy": [bool(is_greedy) for _, is_greedy in responses],
        }
    elif all(isinstance(response, float) for response in responses):
        said = {"logprobs": responses}
    else:
        said = {
            "resps": [str(text) for response in row["resps"] for text in response],
            "filtered_resps": [str(response) for response in row["filtered_resps"]],
        }
    metrics: dict[str, Any] = {}
    for metric in row["metrics"]:
        value = row[metric]
        if isinstance(value, (bool, int, float)):
            metrics[metric] = float(value)
        elif isinstance(value, (tuple, list)) and len(value) == 2 and metric in UNITS:
            metrics[metric] = float(task.aggregation()[metric]([value]))
            metrics[f"{metric}.logprob"], metrics[f"{metric}.weight"] = map(float, value)
        else:
            metrics[metric] = json.dumps(value, default=str)
    hashes = {key: row[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")}
    return {"task": name, **hashes, **_cluster(name, row["doc"], cluster), **said, **metrics}


def _cluster(name: str, document: dict[str, Any], field: str | None) -> dict[str, str]:
    """A hash of what the documents of a cluster have in common, as a sample keeps it.

    Raises:
        ValueError: the document has no such field.
    """
    if field is None:
        return {}
    if field not in document:
        raise ValueError(f"task {name}: its rows have no field '{field}' for cluster; they have {', '.join(document)}")
    return {"cluster": text.sha256(f"{name}/{document[field]}")[:16]}


def _ratio_stderr(rows: list[dict[str, Any]], metric: str, value: float) -> float | None:
    """The standard error of a perplexity over words or bytes, bootstrapped over documents; None for other metrics."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(rows) < 2 or f"{metric}.logprob" not in rows[0]:
        return None

    def statistic(logprob: Any, weight: Any, axis: int = -1) -> Any:
        nats = -logprob.sum(axis) / weight.sum(axis)
        return nats / np.log(2) if metric == "bits_per_byte" else np.exp(nats)

    logprobs, weights = (np.array([row[f"{metric}.{part}"] for row in rows]) for part in ("logprob", "weight"))
    if not np.isclose(statistic(logprobs, weights), value):  # lm-eval aggregates it otherwise
        return None
    rng = np.random.default_rng(RANDOM_SEED)
    drawn = bootstrap(
        (logprobs, weights),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=BOOTSTRAP_REPEATS,
        method="percentile",
        rng=rng,
    )
    return float(drawn.standard_error)


def _generators() -> tuple[Any, Any, Any]:
    """The states of the global generators: Python's, numpy's, torch's."""
    import numpy as np
    import torch

    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_generators(states: tuple[Any, Any, Any]) -> None:
    import numpy as np
    import torch

    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The global generators as lm-eval seeds them inside the block, and as before after it."""
    import numpy as np
    import torch

    before = _generators()
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    try:
        yield
    finally:
        _set_generators(before)


@contextlib.contextmanager
def _unbounded() -> Iterator[None]:
    """Inside the block lm-eval's perplexity beyond every float is infinite, and no error."""
    from lm_eval.api import metrics

    # not the aggregations themselves, by which lm-eval finds their standard error
    metrics.math = SimpleNamespace(**{**vars(math), "exp": exponential})
    try:
        yield
    finally:
        metrics.math = math


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """Inside the block lm-eval compiles a prompt's template once, not once a document."""
    from lm_eval.utils import env

    env.from_string = lru_cache(maxsize=1024)(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # the class's own again


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block lm-eval logs only errors, shows no bars, prints nothing and starts no processes."""
    import datasets
    from lm_eval.api.task import tqdm  # the class behind every bar here

    logger = logging.getLogger("lm_eval")
    level, init, alone = logger.level, tqdm.__init__, os.environ.get("DISABLE_MULTIPROC")
    bars = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(init, disable=True)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork a process that holds a model
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = init
        if not bars:
            datasets.enable_progress_bars()
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
