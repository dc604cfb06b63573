"""The CustomResourceDefinition: valid in Kubernetes, and never stricter than the spec, whose messages it repeats."""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from crd_admission import admit
from crd_cel import cel_value, evaluate
from crd_definition import definition_problems
from crd_pruning import root_schema
from crd_validation import validate_schema
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from object_validation import assert_valid_object
from tests.unit.test_spec_problems import MISTAKES, edit

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.definition import CUSTOM_RESOURCES, TRANSFER_JOB, TRANSFER_SEARCH, definition, definition_text
from topwork.cluster.definition.cel import CEL_RULES
from topwork.cluster.definition.custom_resource import CustomResource
from topwork.cluster.definition.validation_rules import NOT_EXPRESSIBLE
from topwork.cluster.manifests.transfer_job import build_transfer_job, parse_transfer_job
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.spec.job import JobSpec, TransferJob
from topwork.spec.loading.loader import read_jobs
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.loading.yaml_document import read_documents
from topwork.spec.schema import key_types
from topwork.spec.search import TransferSearch
from topwork.spec.spec_model import SpecModel, get_rules

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))
SCHEMA = definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def problems_of(data: KubernetesObject) -> list[tuple[str, str]]:
    """Return the path and message of each problem that the controller reports."""
    try:
        parse_transfer_job(data)
    except InvalidSpecError as error:
        return [(problem.path, problem.message) for problem in error.problems]
    return []


def change(data: KubernetesObject, changes: dict[str, Any]) -> KubernetesObject:
    """Return a copy of an object with other values at dotted paths below spec; None removes a key."""
    result = copy.deepcopy(data)
    for path, value in changes.items():
        *parents, key = path.split(".")
        mapping = result["spec"]
        for parent in parents:
            mapping = mapping.setdefault(parent, {})
        mapping[key] = value
        if value is None:
            del mapping[key]
    return result


def invalid_specs() -> Iterator[KubernetesObject]:
    """Yield the invalid specs of `test_spec_problems` that can be sent to an API server, and those of `VIOLATIONS`."""
    for changes, _ in MISTAKES:
        document = next(read_documents(edit(changes)))
        metadata = document.data.get("metadata") if isinstance(document.data, dict) else None
        if document.issues or not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
            continue
        # Annotations concern only the API server.
        if "annotations" not in metadata and is_json(document.data):
            yield document.data
    yield from (change(VALID, violation) for violation in VIOLATIONS)


def is_json(data: Any) -> bool:
    """Return whether JSON can represent the numbers of a document: it has neither NaN nor infinity."""
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        return False
    return True


VALID = next(read_documents(edit({}))).data
OPTIMIZER, SCHEDULE, TABLE = "transfer.optimizer", "transfer.optimizer.schedule", "dataset.source.table"
CUT = {"dataset.source.tfds": None, "dataset.splits": "auto", f"{TABLE}.uri": "s3://bucket/labels.csv"}
# Violations of rules in CEL that `test_spec_problems` does not contain.
VIOLATIONS: list[dict[str, Any]] = [
    {"fineTune.optimizer.gradientAccumulationSteps": 2},
    {"compute.gpus": None, "compute.nodes": 3},
    {"compute.gpus": 1, "compute.nodes": 2, "fineTune.optimizer.gradientAccumulationSteps": 2},
    {"model.base.application": "InceptionV3", "dataset.imageSize": [150, 74]},
    {"model.base.application": "ResNet50", "dataset.imageSize": [31, 150]},
    {"dataset.source": {"folder": {"uri": "s3://ml-artifacts"}}, "dataset.splits": {"train": 0.8, "test": 0.2}},
    {
        "storage": f"s3://b{'u' * 40}t/topwork/runs/",
        "dataset.source": {"folder": {"uri": f"s3://b{'u' * 40}t/topwork"}},
    },
    CUT | {f"{TABLE}.split": "image"},
    CUT | {f"{TABLE}.split": "label"},
    {"model.base.saved": {"uri": "s3://bucket/model.keras"}, "model.base.cnn": {"filters": [8]}},
    {"dataset.source.folder.uri": "s3://bucket", f"{TABLE}.uri": "s3://bucket/labels.csv"},
    *({f"{OPTIMIZER}.name": "ftrl", f"{OPTIMIZER}.{key}": 0.5} for key in ("beta1", "beta2", "rho", "epsilon")),
    {f"{OPTIMIZER}.nesterov": False},
    {f"{OPTIMIZER}.name": "sgd", f"{OPTIMIZER}.epsilon": 0.00005},
    {f"{OPTIMIZER}.clipnorm": 1.0, f"{OPTIMIZER}.globalClipnorm": 1.0},
    {f"{OPTIMIZER}.clipnorm": 1.0, f"{OPTIMIZER}.globalClipnorm": 1.0, f"{OPTIMIZER}.clipvalue": 1.0},
    *({SCHEDULE: {"name": "constant", key: 0.5}} for key in ("finalFraction", "rate", "factor")),
    {SCHEDULE: {"name": "constant", "atEpochs": [2, 4]}},
    *({SCHEDULE: {"name": name}} for name in ("exponential", "inverseTime", "step")),
    {
        "evaluate.metrics": ["calibrationError"],
        "evaluate.gates": [{"metric": "calibrationError", "atLeastLatestMinus": 1}],
    },
    {"publish.formats": ["keras", "onnx", "keras"]},
    {"compute.tolerations": [{"operator": "Exists"}, {"value": "spot"}]},
    {"metrics.pushgateway": "ftp://host"},
]


BOUNDS: dict[type[Any], str] = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
TEXTS = [
    "s3://bucket/cats.zip", "s3://bucket/cats/", "s3://bucket/labels.csv", "s3://bucket/model.keras", "data/list.txt",
    "https://host/cats.tar.gz", "http://me:pw@host", "imagenet", "none", "Xception", "ResNet50", "cats_vs_dogs",
    "train[:40%]", "train[40%:60%]", "test", "a.b", "registry/topwork:1", "16Gi", "500m", "64Mi", "0.5", "(a)|b", "",
    "mnist:3.0.1", "Ä ö", "a" * 64, "0" * 64,
]  # fmt: skip
# Shrinking a failure would take minutes.
property_settings = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)


@pytest.mark.parametrize("resource", CUSTOM_RESOURCES, ids=lambda resource: resource.model.__name__)
def test_definition_is_valid_in_every_version_of_kubernetes(resource: CustomResource) -> None:
    assert definition_problems(definition(resource)) == []
    assert_valid_object(definition(resource))


def test_files_in_the_repository_are_up_to_date() -> None:
    texts = {
        "charts/topwork/crds/transferjobs.yaml": definition_text(TRANSFER_JOB),
        "charts/topwork/crds/transfersearches.yaml": definition_text(TRANSFER_SEARCH),
        "k8s/controller/crd.yaml": definition_text(),
    }
    for path, text in texts.items():
        assert (REPOSITORY / path).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("resource", CUSTOM_RESOURCES, ids=lambda resource: resource.model.__name__)
def test_definition_can_be_applied_on_the_client_side(resource: CustomResource) -> None:
    """Client-side `kubectl apply` stores the object in an annotation of at most 256 KiB."""
    assert len(json.dumps(definition(resource))) < 256 * 1024 * 0.8


def test_every_rule_is_mirrored_in_cel_or_listed_with_a_reason() -> None:
    rules = {check for _, model in key_types.walk_models(TransferSearch) for check in get_rules(model)}
    rules |= {check for _, model in key_types.walk_models(TransferJob) for check in get_rules(model)}
    assert CEL_RULES.keys() | NOT_EXPRESSIBLE.keys() == rules
    assert not CEL_RULES.keys() & NOT_EXPRESSIBLE.keys()
    assert all(NOT_EXPRESSIBLE.values())


def test_complete_status_is_accepted_and_printed() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    condition = {"type": "Complete", "status": "True", "reason": "Published", "lastTransitionTime": now}
    attempt = {"pod": "cats-1", "uid": "5d41402a", "started": now, "gpuSeconds": 1.5}
    names = ("run", "stage", "progress", "eta", "metric", "model", "waitingFor", "error", "image", "jobUid", "dataset")
    texts = dict.fromkeys(names, "text")
    numbers = dict.fromkeys(("modelVersion", "exitCode", "gpus", "failures", "attempts", "gpuSeconds"), 1)
    lists = {"conditions": [condition], "attemptHistory": [attempt]}
    times = {"startTime": now, "completionTime": now}
    metrics = {"metrics": {"accuracy": 0.9, "loss": 0.4}}
    status = TransferJobStatus.model_validate(texts | numbers | lists | times | metrics)
    dumped = json.loads(status.model_dump_json(by_alias=True, exclude_none=True))
    assert dumped.keys() == {field.alias for field in TransferJobStatus.model_fields.values()}
    _, unknown, errors = admit(VALID | {"status": dumped}, SCHEMA)
    assert (unknown, errors) == ([], [])
    columns = definition()["spec"]["versions"][0]["additionalPrinterColumns"]
    paths = {column["jsonPath"] for column in columns} - {".metadata.creationTimestamp"}
    assert paths <= {f".status.{key}" for key in dumped}


def rule_nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema with rules."""
    if "x-kubernetes-validations" in schema:
        yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from rule_nodes(inner, f"{path}.{key}")
    if "items" in schema:
        yield from rule_nodes(schema["items"], f"{path}[]")


def test_values_in_rules_have_a_maximum_length() -> None:
    """Without one, the API server estimates a cost above its limit and rejects the definition."""
    for path, schema in rule_nodes(SCHEMA):
        for rule in schema["x-kubernetes-validations"]:
            values = re.sub(r"has\([^)]*\)", "", rule["rule"] + rule.get("messageExpression", ""))
            for name in re.findall(r"self((?:\.[A-Za-z0-9]+)*)", values):
                node = schema
                for key in name.split(".")[1:]:
                    node = node.get("properties", {}).get(key, {})
                bounds = {"array": "maxItems", "string": "maxLength"}
                bound = bounds.get(node.get("type", ""))
                assert bound is None or bound in node or "enum" in node, f"{path}{name}"


def test_messages_join_values_with_format() -> None:
    """The length of string(number) is not known, so the operator + has an unlimited cost."""
    for path, schema in rule_nodes(SCHEMA):
        for rule in schema["x-kubernetes-validations"]:
            assert not re.search(r"string\([^\"]*\)+ \+|\+ \(*string\(", rule.get("messageExpression", "")), path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted_as_kubectl_reads_them(path: Path) -> None:
    for data in yaml.load_all(path.read_text(encoding="utf-8"), YamlOfKubectl):
        obj, unknown, errors = admit(data, SCHEMA)
        assert (unknown, errors) == ([], [])
        assert parse_transfer_job(obj).run in {job.run for job in read_jobs(path)}


class YamlOfKubectl(yaml.SafeLoader):
    """YAML 1.1 as Go reads it, in which 1e-5 is a number, too."""


YamlOfKubectl.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), [*"-+0123456789."]
)


def test_words_that_yaml_1_1_reads_as_booleans_are_accepted() -> None:
    changes = {
        "transfer.featureCache": False,
        "fineTune.featureCache": {"use": True},
        "fineTune.unfreeze": {"layers": 3},
    }
    data = change(VALID, changes | {"dataset.audit": {"nearDuplicates": False, "labelIssues": False}})
    obj, unknown, errors = admit(data, SCHEMA)
    assert (unknown, errors) == ([], [])
    spec = parse_transfer_job(obj).spec
    assert (spec.transfer.cache.use, spec.fine_tune.cache.use, spec.dataset.audit.near_duplicates) == (
        "off",
        "on",
        "off",
    )


def test_every_rule_in_cel_has_the_message_of_the_spec() -> None:
    """Each CEL rule is violated at least once, with a message that `topwork validate` prints for the same spec."""
    violated = set()
    for data in invalid_specs():
        obj, _, errors = admit(data, SCHEMA)
        problems = problems_of(data)
        if [*validate_schema(obj, root_schema(SCHEMA))]:
            continue
        for error in errors:
            # The spec does not check the rules of a section that contains a violation.
            is_nested = any(path.startswith((f"{error.path}.", f"{error.path}[")) for path, _ in problems)
            messages = [message for path, message in problems if path.startswith(error.path)]
            assert any(str(error).endswith(f": {message}") for message in messages) or is_nested, (str(error), problems)
        violated |= violated_rules(obj, SCHEMA)
    rules = {rule["rule"] for _, schema in rule_nodes(SCHEMA) for rule in schema["x-kubernetes-validations"]}
    assert violated == rules


def violated_rules(value: Any, schema: dict[str, Any]) -> set[str]:
    """Return the CEL rules that a value and the values below it violate."""
    items = value if isinstance(value, list) else []
    inner = [(item, schema.get("items", {})) for item in items]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        inner += [(value[key], properties[key]) for key in value.keys() & properties.keys()]
    found = {
        rule["rule"]
        for rule in schema.get("x-kubernetes-validations", [])
        if not evaluate(rule["rule"], {"self": cel_value(value, schema, is_root=schema is SCHEMA)})
    }
    return found.union(*(violated_rules(*pair) for pair in inner)) if schema.get("type") else found


def test_defaults_of_the_api_server_change_no_problem() -> None:
    for data in invalid_specs():
        problems = problems_of(data)
        obj, unknown, _ = admit(data, SCHEMA)
        assert problems, data
        if not unknown and not has_null(data):
            assert problems_of(obj) == problems


@property_settings
@given(st.data())
def test_every_valid_spec_is_accepted_and_keeps_its_run(data: st.DataObject) -> None:
    """Random values of random keys: what the API server rejects, the spec rejects, too."""
    obj = data.draw(st.sampled_from([build_transfer_job(job, None) for path in EXAMPLES for job in read_jobs(path)]))
    for _ in range(data.draw(st.integers(1, 4))):
        set_any_value(data, JobSpec, obj["spec"])
    stored, unknown, errors = admit(obj, SCHEMA)
    problems = problems_of(obj)
    if not unknown:
        assert problems_of(stored) == problems
    if not problems:
        assert (unknown, errors) == ([], [])
        assert parse_transfer_job(stored).run == parse_transfer_job(obj).run


def set_any_value(data: st.DataObject, model: type[SpecModel], values: dict[str, Any]) -> None:
    """Set or remove any key of a mapping, or a key below it."""
    key, field = data.draw(st.sampled_from([*key_types.fields_by_key(model).items()]))
    allowed = data.draw(st.sampled_from([*key_types.expand_types(field.annotation, field.metadata)]))
    if key_types.is_model(allowed.python_type) and data.draw(st.booleans()):
        inner = values[key] if isinstance(values.get(key), dict) else {}
        values[key] = inner
        set_any_value(data, allowed.python_type, inner)
    elif data.draw(st.integers(0, 4)) == 0:
        values.pop(key, None)
    else:
        values[key] = data.draw(any_value(allowed))


def any_value(allowed: key_types.KeyType) -> st.SearchStrategy[Any]:
    """Return a strategy of values of a type of the spec."""
    python_type, arguments = allowed.python_type, get_args(allowed.python_type)
    if get_origin(python_type) is Literal:
        return st.sampled_from(arguments)
    if key_types.is_model(python_type):
        fields = key_types.fields_by_key(python_type)
        values = {
            key: any_of(key_types.expand_types(field.annotation, field.metadata)) for key, field in fields.items()
        }
        required = {key for key, field in fields.items() if field.is_required()}
        optional = {key: value for key, value in values.items() if key not in required}
        return st.fixed_dictionaries({key: values[key] for key in required}, optional=optional)
    if key_types.is_list(python_type):
        minimum, maximum = allowed.find(MinLen), allowed.find(MaxLen)
        low = minimum.min_length if minimum else 0 if Ellipsis in arguments else len(arguments)
        high = min(maximum.max_length if maximum else low + 2, low + 2) if Ellipsis in arguments else low
        return st.lists(any_of(key_types.expand_types(arguments[0])), min_size=low, max_size=high)
    if get_origin(python_type) is dict:
        return st.sampled_from([{}, {"operator": "Exists"}, {"key": "spot", "value": "a"}, {"cat": ["siamese"]}])
    if python_type is bool:
        return st.booleans()
    if python_type in {int, float}:
        return any_number(allowed)
    return st.sampled_from(TEXTS)


def any_of(types: Iterable[key_types.KeyType]) -> st.SearchStrategy[Any]:
    return st.one_of([any_value(allowed) for allowed in types])


def any_number(allowed: key_types.KeyType) -> st.SearchStrategy[Any]:
    """Return numbers at and near the bounds of a type."""
    bounds = [getattr(bound, name) for kind, name in BOUNDS.items() if (bound := allowed.find(kind))]
    near = {bound + step for bound in bounds for step in (-1, 0, 1)} | {0, 1, 2, 4}
    if allowed.python_type is int:
        return st.sampled_from(sorted(map(int, near)))
    return st.sampled_from(sorted(near | {0.1, 0.5, 0.0001})).map(float)


def has_null(value: Any) -> bool:
    """Return whether a value contains null, which the API server removes."""
    if isinstance(value, dict | list):
        return any(map(has_null, value.values() if isinstance(value, dict) else value))
    return value is None


def test_secret_in_the_query_of_a_uri_is_not_shown() -> None:
    _, _, errors = admit(change(VALID, {"metrics.pushgateway": "ftp://host/?token=hush-hush"}), SCHEMA)
    assert [str(error) for error in errors] == [
        "spec.metrics.pushgateway: Forbidden: the value is not allowed. Allowed: http://…, https://…."
    ]


def test_password_in_a_uri_is_not_shown() -> None:
    _, _, errors = admit(change(VALID, {"storage": "s3://me:hush-hush@bucket/key"}), SCHEMA)
    assert [str(error) for error in errors] == [
        "spec.storage: Forbidden: contains a user name or password (not shown here), but specs are stored and shared. "
        "Remove it and pass credentials in environment variables."
    ]
