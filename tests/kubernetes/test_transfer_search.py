"""Conversion between the custom resource TransferSearch and the models of the spec."""

import pytest
import sample_searches
from api_server import ApiServer

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.definition import TRANSFER_SEARCH, definition
from topwork.cluster.manifests.defaults import parse_defaults
from topwork.cluster.manifests.transfer_search import build_transfer_search, parse_transfer_search
from topwork.search.search_id import search_id
from topwork.spec.loading.problems import InvalidSpecError

CACHE = "transfer.featureCache"
EPOCHS = "transfer.epochs"


def test_a_stored_search_has_the_id_of_its_file(api_server: ApiServer, cluster: Cluster) -> None:
    api_server.install_crd(definition(TRANSFER_SEARCH))
    search = parse_transfer_search(sample_searches.search())
    stored = cluster.apply(build_transfer_search(search, "team-a"))
    assert search_id(parse_transfer_search(stored)) == search_id(search)


def test_only_set_values_are_built_and_null_remains_a_choice() -> None:
    space = {"fineTune": {"choice": [None, {"epochs": 2}]}, EPOCHS: {"int": [1, 9], "when": {"fineTune": None}}}
    obj = sample_searches.search(space=space)
    built = build_transfer_search(parse_transfer_search(obj), "team-a")
    assert built["spec"] == obj["spec"]
    assert built["metadata"] == obj["metadata"] | {"namespace": "team-a"}


def test_switches_that_yaml_1_1_reads_as_booleans_are_restored() -> None:
    space = {
        CACHE: {"choice": [True, False, "auto"]},
        "augmentation.rotation": {"uniform": [0.0, 0.1], "when": {CACHE: False}},
        "model.head.dropout": {"uniform": [0.0, 0.5]},
    }
    template = sample_searches.TEMPLATE | {"transfer": {"epochs": 9, "featureCache": True}}
    spec = parse_transfer_search(sample_searches.search(space=space, template=template)).spec
    assert spec.space[CACHE].choice == ("on", "off", "auto")
    assert spec.space["augmentation.rotation"].when == {CACHE: "off"}
    assert spec.template.transfer.feature_cache == "on"


def test_defaults_of_the_namespace_fill_the_template() -> None:
    obj = sample_searches.search()
    del obj["spec"]["template"]["storage"]
    with pytest.raises(InvalidSpecError, match=r"spec\.template\.storage"):
        parse_transfer_search(obj)
    defaults = parse_defaults("spec: {storage: s3://own/topwork, compute: {queue: team-a, gpus: 8}}").spec
    template = parse_transfer_search(obj, defaults).spec.template
    assert (template.storage, template.compute.queue, template.compute.gpus) == ("s3://own/topwork", "team-a", 2)
