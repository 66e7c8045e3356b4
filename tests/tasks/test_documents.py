"""What is kept of a task's documents from cell to cell."""

from types import SimpleNamespace

from lm_eval.api.task import ConfigurableTask

from kvbench.tasks.documents import Document, Documents, has_code, keep


def test_documents_are_read_once_and_no_sooner():
    """
    A row is decoded when it is first asked for, and is the same object ever after, for two that read at once too.
    """
    read = []

    class Rows:
        def __len__(self):
            return 3

        def __iter__(self):
            for number in range(3):
                read.append(number)
                yield {"number": number}

    documents = Documents(Rows())

    first, second = iter(documents), iter(documents)
    pairs = [(next(first), next(second)) for _ in range(2)]

    assert read == [0, 1]
    assert all(a is b and type(a) is Document for a, b in pairs)
    assert [*documents] == [{"number": number} for number in range(3)]
    assert read == [0, 1, 2]


def task_of(**config):
    """A task of lm-eval's own class, without data."""
    made = object.__new__(ConfigurableTask)
    names = ("doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "filter_list")
    made._config = SimpleNamespace(**dict.fromkeys(names), **config)
    return made


def test_a_task_with_code_of_its_own_gets_its_documents_afresh():
    """
    What code could change is not kept: a function for results or targets, a filter's, or a task's own class.
    """
    plain = task_of()
    regex = task_of()
    regex._config.filter_list = [{"name": "one", "filter": [{"function": "regex", "regex_pattern": "a"}]}]
    coded = [task_of() for _ in range(2)]
    coded[0]._config.process_results = coded[1]._config.doc_to_target = lambda *_: {}
    filtered = task_of()
    filtered._config.filter_list = [{"name": "one", "filter": [{"function": "custom", "filter_fn": print}]}]
    coded[1].test_docs = coded[1].validation_docs = lambda: [{"a": 1}]

    assert not has_code(plain)
    assert not has_code(regex)
    assert all(map(has_code, (*coded, filtered, SimpleNamespace())))
    keep(coded[1])
    assert type(coded[1].test_docs()[0]) is dict
