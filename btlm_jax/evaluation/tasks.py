"""Tasks of lm-evaluation-harness, loaded and checked before any weights are read."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.utils.local_paths import local_path

logger = logging.getLogger(__name__)

# Required fields of a task file; one of each tuple suffices.
_REQUIRED_FIELDS = (
    ("dataset_path", "custom_dataset"),
    ("test_split", "validation_split"),
    ("doc_to_text", "use_prompt"),
    ("doc_to_target", "use_prompt"),
)
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
_NO_DOCUMENTS = "found no documents in its data set: see test_split"


@dataclasses.dataclass(frozen=True)
class HarnessTasks:
    """The tasks of a run.

    Attributes:
      manager: lm-eval's `TaskManager`.
      requested: tasks and groups, as requested.
      leaves: every single task, by name.
    """

    manager: Any
    requested: tuple[Any, ...]
    leaves: Mapping[str, Any]


def load_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
) -> HarnessTasks:
    """Loads tasks and their data sets, and checks that every document fits the templates.

    Args:
      names: names of tasks, groups or tags, with wildcards; or YAML files.
      include_path: a folder with more tasks, which take precedence over those of lm-eval.
      num_fewshot, limit: as in `harness.run_tasks`.

    Raises:
      FileNotFoundError: no such folder, or an unavailable data set; the message says what to do.
      ValueError: no name, an unknown one (with the nearest), a task file with a missing or unknown
        field, a template that does not fit a document, too few examples; or lm-eval is not
        installed.
    """
    _check_numbers(num_fewshot, limit)
    if not names:
        raise ValueError("tasks: found none, expected names of tasks, such as hellaswag")
    if include_path is not None:
        include_path = local_path(include_path, "include_path")
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"include_path: found no folder {include_path}")
    manager = _manager(names, include_path)
    leaves: dict[str, Any] = {}
    requested = []
    for name in _match_names(manager, names, include_path):
        built = _build_task(manager, name)
        leaves |= built["tasks"]
        groups = list(built.get("groups", {}).values())
        requested += groups[:1] or list(built["tasks"].values())
    for name, task in leaves.items():
        _check_fewshot(name, task, num_fewshot)
        _check_documents(name, task, limit)
    return HarnessTasks(manager, tuple(requested), leaves)


def import_lm_eval(name: str) -> Any:
    """Imports a module of lm-eval, which takes seconds and is an optional dependency.

    Raises:
      ValueError: lm-eval is not installed.
    """
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ModuleNotFoundError as e:
        raise ValueError(f"tasks need lm-eval ({e}): pip install 'btlm-jax[eval]'") from None


def _check_numbers(num_fewshot: int | None, limit: int | float | None) -> None:
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot: found {num_fewshot}, expected 0 or more examples")
    if limit is not None and (limit <= 0 or (limit >= 1 and limit != int(limit))):
        raise ValueError(
            f"limit: found {limit}, expected a number of documents, or a fraction of them below 1"
        )


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Returns lm-eval's index of tasks.

    Leaves out lm-eval's own tasks, whose index takes seconds, if the folder has all names.
    """
    task_manager = import_lm_eval("tasks").TaskManager
    if include_path is not None:
        manager = task_manager(include_path=str(include_path), include_defaults=False)
        index = manager.task_index
        if {n for n in index if index[n].kind.name == "TASK"}.issuperset(names):
            return manager
    return task_manager(include_path=None if include_path is None else str(include_path))


def _match_names(manager: Any, names: Sequence[str], include_path: Path | None) -> Iterable[str]:
    """Returns the names that match, in order, without duplicates."""
    matches: dict[str, None] = {}
    for name in names:
        if Path(name).suffix == ".yaml":
            name = str(local_path(name, "tasks"))
            if not Path(name).is_file():
                raise FileNotFoundError(f"tasks: found no file {name}")
            matches[name] = None
            continue
        matched = manager.match_tasks([name])
        if not matched:
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            hint += _unused_files(manager, include_path)
            raise ValueError(f"tasks: found no task {name!r}: {hint}")
        matches |= dict.fromkeys(matched)
    return matches


def _unused_files(manager: Any, include_path: Path | None) -> str:
    """Returns a hint that lists files of the folder without a task, which lm-eval ignores."""
    if include_path is None:
        return ""
    used = {Path(e.yaml_path) for e in manager.task_index.values() if e.yaml_path is not None}
    files = sorted(str(p) for p in include_path.rglob("*.yaml") if p not in used)
    if not files:
        return ""
    return f"; these files define none: {', '.join(files)} (pass one as a task to see why)"


def _build_task(manager: Any, name: str) -> Any:
    """Builds a task or group, with its data set.

    The harness and the datasets library raise exceptions of any class.
    """
    entry = manager.task_index.get(name)
    if entry is not None and entry.kind.name == "TASK":
        _check_fields(f"{entry.yaml_path}", entry.cfg)
        _check_metrics(f"{entry.yaml_path}", entry.cfg)
    if entry is not None and entry.kind.name == "GROUP":
        members = (entry.cfg or {}).get("task") or ()
        missing = [x for x in members if isinstance(x, str) and x not in manager.task_index]
        if missing:
            raise ValueError(f"{entry.yaml_path}: task: found no task {missing[0]!r} for {name}")
    try:
        return manager.load([name])
    except FileNotFoundError as e:
        message = " ".join(str(e).split())[:300]
        raise FileNotFoundError(f"task {name}: {message}") from None
    except ConnectionError as e:
        raise FileNotFoundError(
            f"task {name}: its data set is not available ({e}): connect to the network, run "
            "`datasets.load_dataset` on a machine with one and copy its cache (HF_HOME), or write "
            "a task file over local data (--include-path)"
        ) from None
    except StopIteration:  # lm-eval tries the templates on the first document
        raise ValueError(f"task {name}: {_NO_DOCUMENTS}") from None
    except KeyError as e:
        splits = [field for field in _SPLITS if entry and entry.cfg.get(field) in e.args]
        if not splits:
            raise ValueError(f"task {name}: {describe_error(e)}") from None
        raise ValueError(
            f"task {name}: {splits[0]}: found {e.args[0]!r}, which its data set does not have"
        ) from None
    except IndexError as e:  # lm-eval tries the templates on the first document
        raise ValueError(
            f"task {name}: {describe_error(e)}, on its first document: expected doc_to_choice to "
            "give choices, and doc_to_target one of them"
        ) from None
    except Exception as e:
        raise ValueError(f"task {name}: {describe_error(e)}") from None


def _check_fields(file: str, fields: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(import_lm_eval("config.task").TaskConfig)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"{file}: found a field {name!r} that tasks do not have{hint}")
    for names in _REQUIRED_FIELDS:
        if all(fields.get(name) is None for name in names):
            raise ValueError(f"{file}: found no field {' or '.join(names)}, which a task needs")
    if fields.get("output_type") == "multiple_choice" and fields.get("doc_to_choice") is None:
        raise ValueError(f"{file}: found no field doc_to_choice, which multiple_choice needs")


def _check_metrics(file: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError if a metric or an aggregation has a name that lm-eval does not know."""
    registry = import_lm_eval("api.registry")
    import_lm_eval("api.metrics")  # registers them
    known = {"metric": registry.METRIC_REGISTRY, "aggregation": registry.AGGREGATION_REGISTRY}
    if fields.get("process_results"):  # it names metrics of its own
        del known["metric"]
    for metric in fields.get("metric_list") or ():
        for field, names in known.items():
            value = metric.get(field)
            if not isinstance(value, str) or value in names or metric.get("hf_evaluate"):
                continue
            near = difflib.get_close_matches(value, list(names), 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"{file}: metric_list: {field}: lm-eval has no {value!r}{hint}")


def _check_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    default = task.get_config("num_fewshot")
    if num_fewshot and default == 0:
        logger.warning("task %s has no examples, because it sets num_fewshot: 0", name)
    examples = default if num_fewshot is None or default == 0 else num_fewshot
    if not examples or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return
    sampler, templates = getattr(task, "sampler", None), task.fewshot_cfg
    docs = [] if sampler is None else sampler.fewshot_docs()
    # Examples from the test split leave out the question.
    left_out = templates.split is not None and templates.split == task.config.test_split
    if len(docs) < examples + left_out:
        except_question = ", without the question itself" if left_out else ""
        raise ValueError(
            f"task {name}: num_fewshot: found {examples}, expected at most the "
            f"{len(docs) - left_out} documents to take examples from{except_question} "
            "(fewshot_split, training_split)"
        )
    for number, doc in enumerate(docs):
        _check_document(f"task {name}: few-shot examples", task, number, doc, templates)


def _check_documents(name: str, task: Any, limit: int | float | None) -> None:
    max_documents = import_lm_eval("evaluator_utils").get_sample_size(task, limit)
    count = without_answer = 0
    for number, doc in task.doc_iterator(limit=max_documents):
        _check_document(f"task {name}", task, number, doc, task.config)
        count += 1
        without_answer += not _has_answer(name, task, number, doc)
    if not count:
        raise ValueError(f"task {name}: {_NO_DOCUMENTS}")
    if without_answer:
        logger.warning(
            "task %s: doc_to_target of %d of %d documents is none of their choices: they count as "
            "answered wrongly", name, without_answer, count,
        )  # fmt: skip


def _has_answer(name: str, task: Any, number: int, doc: Any) -> bool:
    """Returns whether the target of a document is one of its choices; True without choices."""
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", False):
        return True
    choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
    if not choices:
        raise ValueError(f"task {name}: document {number} has no choices: see its doc_to_choice")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(
            f"task {name}: document {number} has an empty choice, which cannot be scored by its "
            "length: see its doc_to_choice"
        )
    targets = target if isinstance(target, list) else [target]
    return all(0 <= t < len(choices) if isinstance(t, int) else t in choices for t in targets)


def _check_document(context: str, task: Any, number: int, doc: Any, templates: Any) -> None:
    """Raises ValueError if a template does not fit: a missing field, a choice out of range.

    The harness checks only the first document, or does not say which document failed.
    """
    for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = getattr(templates, field)
        if field == "doc_to_choice" and not template:
            continue
        try:  # tasks in Python may accept no other templates than their own
            getattr(task, field)(doc, *([] if templates is task.config else [template]))
        except Exception as e:
            raise ValueError(
                f"{context}: {field} does not fit document {number} ({describe_error(e)}), which "
                f"has the fields {', '.join(map(str, doc))}"
            ) from None


def describe_error(e: Exception) -> str:
    """Returns the class and message of an error, or of its cause, cut to a few lines of text."""
    e = e.__cause__ if isinstance(e.__cause__, Exception) else e
    message = " ".join(str(e).split()) or "no message"
    return f"{type(e).__name__}: {message if len(message) <= 300 else message[:300] + ' ...'}"
