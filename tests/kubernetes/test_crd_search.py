"""The CustomResourceDefinition of searches: never stricter than the spec, whose messages it repeats."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from crd_admission import admit
from crd_errors import FieldError
from crd_pruning import root_schema
from crd_validation import validate_schema
from tests.kubernetes.test_crd import YamlOfKubectl, violated_rules
from tests.unit.test_spec_search import FILE, MISTAKES, data_of

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.definition import TRANSFER_JOB, TRANSFER_SEARCH, definition
from topwork.cluster.manifests.transfer_search import build_transfer_search, parse_transfer_search
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.spec.loading.loader import read_searches
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.search.space import trial_spec

EXAMPLES = [FILE, *sorted((Path(__file__).parents[2] / "examples" / "searches").glob("*.yaml"))]


def schema_of(resource: Any) -> dict[str, Any]:
    schema: dict[str, Any] = definition(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


SCHEMA = schema_of(TRANSFER_SEARCH)
TEMPLATE = SCHEMA["properties"]["spec"]["properties"]["template"]
PARAMETER = SCHEMA["properties"]["spec"]["properties"]["space"]["additionalProperties"]
# Violations of rules in CEL that `MISTAKES` does not contain: changes of the template.
VIOLATIONS: list[dict[str, Any]] = [
    {"transfer": {"batchSize": 65}, "compute": {"gpus": 2}},
    {"publish": {"formats": ["keras", "keras"]}},
]


def problems_of(data: KubernetesObject) -> list[tuple[str, str]]:
    """Return the path and message of each problem that the controller reports."""
    try:
        parse_transfer_search(data)
    except InvalidSpecError as error:
        return [(problem.path, problem.message) for problem in error.problems]
    return []


class Rejected(NamedTuple):
    """An invalid search, what the API server does with it, and the problems that the controller reports."""

    data: KubernetesObject
    stored: KubernetesObject
    unknown: list[str]
    errors: list[FieldError]
    problems: list[tuple[str, str]]

    @property
    def evaluates_rules(self) -> bool:
        """Whether the API server evaluates rules: only for an object that matches its schema."""
        return not [*validate_schema(self.stored, root_schema(SCHEMA))]


@pytest.fixture(scope="module")
def rejected() -> list[Rejected]:
    # An API server rejects an unknown kind without reading the definition.
    searches = [data for changes, _ in MISTAKES if (data := data_of(changes))["kind"] == "TransferSearch"]
    for violation in VIOLATIONS:
        data = data_of({})
        data["spec"]["template"] |= violation
        searches.append(data)
    return [Rejected(data, *admit(data, SCHEMA), problems_of(data)) for data in searches]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted_as_kubectl_reads_them(path: Path) -> None:
    (data,) = yaml.load_all(path.read_text(encoding="utf-8"), YamlOfKubectl)
    obj, unknown, errors = admit(data, SCHEMA)
    assert (unknown, errors) == ([], [])
    ((_, search),) = read_searches([path])
    assert parse_transfer_search(obj).spec.model_dump() == search.spec.model_dump()


def test_template_has_the_schema_of_a_job() -> None:
    schemas = (schema_of(TRANSFER_JOB)["properties"]["spec"], TEMPLATE)
    job, template = ({**schema, "description": ""} for schema in schemas)
    text = json.dumps(template)
    assert "spec.template.transfer.optimizer.learningRate" in text
    assert json.loads(text.replace("spec.template.", "spec.")) == job


def test_null_among_choices_and_conditions_is_kept() -> None:
    data = data_of({"asha": "none", "transfer.batchSize: {int: [16, 64]}": "fineTune: {choice: [null, {epochs: 2}]}"})
    data["spec"]["space"]["transfer.batchSize"] = {"choice": [16, 32], "when": {"fineTune": None}}
    obj, unknown, errors = admit(data, SCHEMA)
    assert (unknown, errors) == ([], [])
    space = parse_transfer_search(obj).spec.space
    assert space["fineTune"].choice == (None, {"epochs": 2})
    assert space["transfer.batchSize"].when == {"fineTune": None}
    built = build_transfer_search(parse_transfer_search(obj), "team-a")
    assert built["spec"]["space"]["transfer.batchSize"]["when"] == {"fineTune": None}


def test_words_that_yaml_1_1_reads_as_booleans_are_accepted_as_choices() -> None:
    data = data_of({})
    data["spec"]["space"]["transfer.featureCache"] = {"choice": ["auto", False]}
    obj, unknown, errors = admit(data, SCHEMA)
    assert (unknown, errors) == ([], [])
    search = parse_transfer_search(obj)
    assert trial_spec(search, {"transfer.featureCache": "off"}).transfer.cache.use == "off"
    assert search.spec.space["transfer.featureCache"].choice == ("auto", "off")


def test_every_error_of_the_api_server_has_the_message_of_the_spec(rejected: list[Rejected]) -> None:
    for search in filter(lambda search: search.evaluates_rules, rejected):
        for error in search.errors:
            path = error.path.replace("[", ".").replace("]", "")
            # The spec does not check the rules of a section that contains a violation.
            is_nested = any(other.startswith((f"{path}.", f"{path}[")) for other, _ in search.problems)
            messages = [message for other, message in search.problems if other.startswith(path)]
            assert any(str(error).endswith(f": {message}") for message in messages) or is_nested, str(error)


def test_every_rule_in_cel_outside_the_template_is_violated(rejected: list[Rejected]) -> None:
    rules = {
        rule["rule"]
        for schema in (SCHEMA, SCHEMA["properties"]["spec"], PARAMETER)
        for rule in schema["x-kubernetes-validations"]
        if "matches" not in rule["rule"]  # that of the pattern of a name is tested with jobs
    }
    violated = set().union(*(violated_rules(search.stored, SCHEMA) for search in rejected if search.evaluates_rules))
    for search in rejected:
        for parameter in search.data["spec"]["space"].values():
            if not [*validate_schema(parameter, PARAMETER)]:
                violated |= violated_rules(parameter, PARAMETER)
    assert rules <= violated


def test_defaults_of_the_api_server_change_no_problem(rejected: list[Rejected]) -> None:
    for search in rejected:
        assert search.problems, search.data
        if not search.unknown:
            assert problems_of(search.stored) == search.problems


def test_complete_status_is_accepted_and_printed() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    condition = {"type": "Complete", "status": "True", "reason": "Published", "lastTransitionTime": now}
    texts = ("search", "progress", "metric", "model", "waitingFor", "endReason", "error")
    status = TransferSearchStatus.model_validate(
        dict.fromkeys(texts, "text")
        | {"conditions": [condition], "modelVersion": 1, "gpuSeconds": 1.5, "startTime": now, "completionTime": now}
        | {"best": {"trial": 3, "value": 0.9, "params": {"model.head.dropout": "0.1"}}, "trials": {"running": 1}}
    )
    dumped = json.loads(status.model_dump_json(by_alias=True, exclude_none=True))
    assert dumped.keys() == {field.alias for field in TransferSearchStatus.model_fields.values()}
    _, unknown, errors = admit(data_of({}) | {"status": dumped}, SCHEMA)
    assert (unknown, errors) == ([], [])
    columns = definition(TRANSFER_SEARCH)["spec"]["versions"][0]["additionalPrinterColumns"]
    for column in columns:
        value: Any = {"status": dumped, "metadata": {"creationTimestamp": "now"}}
        for key in column["jsonPath"].split(".")[1:]:
            value = value[key]
