"""A run folder in the schema of Every Eval Ever, a file a scheme. Imports no torch.

Source: https://github.com/evaleval/every_eval_ever, schema 0.3.0.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from kvbench.files import write_text
from kvbench.report.by_scheme import Scheme, by_scheme
from kvbench.results import Metric, Record, plain_json

VERSION = "0.3.0"


def export(folder: Path, place: Path) -> list[Path]:
    """Writes `data/SWEEP/DEVELOPER/MODEL/UUID.json` for each scheme, without the controls; returns them.

    What the schema has no field for, such as the scheme and its bits, stands in `additional_details` as text.

    Raises:
        FileNotFoundError, NotARunError: no run folder, or none with a finished cell of a model.
        OSError: a file that can't be written.
    """
    store, schemes = by_scheme(folder, lambda record: record.scored, "a model")
    run, written = store.run(), []
    for scheme in schemes:
        evaluation = _evaluation(run, scheme)
        developer, _, model = scheme.model.rpartition("/")
        below = place / "data" / (run.get("sweep") or "kvbench") / (developer or "unknown") / model.replace(" ", "-")
        below.mkdir(parents=True, exist_ok=True)
        # of the form that the schema asks for; the same evaluation has the same name
        digest = hashlib.sha256(evaluation["evaluation_id"].encode()).digest()
        path = below / f"{uuid.UUID(bytes=digest[:16], version=4)}.json"
        write_text(path, json.dumps(plain_json(evaluation), indent=2, ensure_ascii=False) + "\n")
        written.append(path)
    return written


def _evaluation(run: dict[str, Any], scheme: Scheme) -> dict[str, Any]:
    model, dtype, rotation, records = scheme.model, scheme.dtype, scheme.rotation, scheme.records
    last = max(records, key=lambda record: record.finished)
    first, when = records[0], str(datetime.fromisoformat(last.finished).timestamp())
    environment = last.environment
    gpus = [gpu["name"] for gpu in environment.get("gpus") or []] if environment.get("device") != "cpu" else []
    return {
        "schema_version": VERSION,
        "evaluation_id": f"{run.get('sweep') or 'kvbench'}/{'/'.join(scheme.names)}/{when}",
        "evaluation_timestamp": when,
        "retrieved_timestamp": when,
        "source_metadata": {
            "source_name": "kvbench",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {
            "name": "kvbench",
            "version": str(environment.get("kvbench") or "unknown"),
            "additional_details": _details(
                source_sha256=environment.get("source_sha256"), versions=environment.get("versions")
            ),
        },
        "model_info": {
            "name": model,
            "id": model,
            "developer": model.rpartition("/")[0] or "unknown",
            "inference_engine": {
                "name": "transformers",
                "version": str((environment.get("versions") or {}).get("transformers") or "unknown"),
            },
            "additional_details": _details(
                deployment_type="self_deployed",
                model_availability="unknown",
                revision=first.model.get("revision"),
                compute_dtype=first.model.get("compute_dtype"),
                kv_cache_dtype=dtype,
                kv_cache_rotation=rotation,
                kv_cache_scheme=first.identity["scheme"],
                kv_cache_bits_per_value=first.bits_per_value,
                kv_cache_bytes_per_token=first.kv_bytes_per_token,
                scoring=first.scoring,
                seed=first.identity.get("seed"),
                hardware=", ".join(gpus) or environment.get("cpu"),
            ),
        },
        "evaluation_results": [
            _result(record, metric, scheme.labels[record.cell]) for record in records for metric in record.metrics
        ],
    }


def _result(record: Record, metric: Metric, called: str) -> dict[str, Any]:
    task = record.identity["task"]
    places = [str(place) for place in (record.facts.get("data") or {}).values()]
    share, error = metric.kind == "share", {"value": metric.stderr, "method": "over documents"}
    return {
        "evaluation_result_id": f"{record.cell}/{metric.name}",
        "evaluation_name": called,
        "evaluation_timestamp": str(datetime.fromisoformat(record.finished).timestamp()),
        "source_data": {
            "dataset_name": (places or [str(task.get("text") or record.task)])[0],
            "source_type": "other",
            "additional_details": _details(
                documents_sha256=record.facts.get("documents_sha256"), limit=task.get("limit"), quick_look=record.limit
            ),
        },
        "metric_config": {
            "metric_id": metric.name,
            "metric_name": metric.name,
            "metric_unit": metric.unit or ("proportion" if share else "none"),
            "lower_is_better": metric.higher_is_better is False,
            "score_type": "continuous",
            "min_score": _range(metric)[0],
            "max_score": _range(metric)[1],
        },
        "score_details": {
            "score": metric.value,
            "uncertainty": {
                **({"standard_error": error} if metric.stderr is not None else {}),
                "num_samples": metric.n,
            },
        },
        "generation_config": {
            "additional_details": _details(num_fewshot=task.get("num_fewshot"), chat=task.get("apply_chat_template"))
        },
    }


def _range(metric: Metric) -> tuple[float | str, float | str]:
    """Between what its values lie, as far as its kind says."""
    if metric.kind == "share":
        return 0.0, 1.0
    if metric.kind == "distance" and metric.unit == "%":
        return 0.0, 100.0
    return (0.0 if metric.kind == "log" else "-Infinity"), "Infinity"


def _details(**values: Any) -> dict[str, str]:
    """What is known, each as text."""
    return {
        name: value if isinstance(value, str) else json.dumps(plain_json(value))
        for name, value in values.items()
        if value is not None
    }
