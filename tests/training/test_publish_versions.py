"""Versions of a model in storage: who gets which number, and what `latest.json` points to."""

import json
from concurrent.futures import ThreadPoolExecutor

from topwork.registry import versions


def finish(storage, number, name="tiny"):
    version = versions.Version(
        name=name, version=number, uri=storage.uri_of(versions.prefix_of(name, number)), run=f"tiny-{number}",
        weights="0a", split="test", images=8, published="2030-01-01T00:00:00Z",
        main_metric="accuracy", metrics={"accuracy": 0.5},
    )  # fmt: skip
    manifest = {"format": 1, "files": {}, "facts": version.model_dump(mode="json")}
    storage.write(f"{versions.prefix_of(name, number)}/manifest.json", json.dumps(manifest).encode())
    return version


def test_publishers_at_once_get_different_versions(storage):
    with ThreadPoolExecutor(6) as pool:
        claimed = list(pool.map(lambda n: versions.claim(storage, "tiny", f"tiny-{n}"), range(6)))
    assert sorted(claimed) == [1, 2, 3, 4, 5, 6]


def test_a_run_takes_up_its_own_claim_and_no_other(storage):
    assert versions.claim(storage, "tiny", "tiny-aaaa") == 1
    storage.write("models/tiny/1/model.keras", b"half an upload")
    assert versions.claim(storage, "tiny", "tiny-bbbb") == 2
    assert versions.claim(storage, "tiny", "tiny-aaaa") == 1
    assert [found.key for found in storage.list("models/tiny/1/")] == ["models/tiny/1/claim.json"]


def test_a_published_version_is_never_claimed_again(storage):
    assert versions.claim(storage, "tiny", "tiny-1") == 1
    finish(storage, 1)
    assert versions.claim(storage, "tiny", "tiny-1") == 2


def test_latest_does_not_move_backwards(storage):
    newer = finish(storage, 2)
    assert versions.move_latest(storage, "tiny") == newer
    finish(storage, 1)
    assert versions.move_latest(storage, "tiny") == newer
    assert versions.latest(storage, "tiny") == newer


def test_the_number_of_a_deleted_version_is_not_given_again(storage):
    finish(storage, 1)
    newest = finish(storage, 2)
    versions.move_latest(storage, "tiny")
    storage.delete(["models/tiny/2/manifest.json"])
    assert versions.move_latest(storage, "tiny") == newest
    assert versions.claim(storage, "tiny", "tiny-3") == 3


def test_models_lists_only_what_is_published(storage):
    finish(storage, 1)
    finish(storage, 10)
    finish(storage, 2)
    finish(storage, 1, "another")
    versions.claim(storage, "tiny", "tiny-begun")
    versions.claim(storage, "begun", "begun")
    assert versions.models(storage) == {"another": [1], "tiny": [1, 2, 10]}


def test_a_version_is_known_again_by_its_run_and_weights(storage):
    first = finish(storage, 1)
    finish(storage, 2)
    assert versions.made_from(storage, "tiny", "tiny-1", "0a") == first
    assert versions.made_from(storage, "tiny", "tiny-1", "0b") is None
    assert versions.made_from(storage, "tiny", "tiny-3", "0a") is None
