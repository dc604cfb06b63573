"""Model versions in storage: claiming numbers, and the pointer `latest.json`."""

import json
from concurrent.futures import ThreadPoolExecutor

from topwork.registry import versions


def finish(storage, number, name="tiny", key="0123456789abcdef"):
    version = versions.Version(
        name=name, version=number, uri=storage.uri_of(versions.version_prefix(name, number)), run=f"tiny-{number}",
        key=key, weights="0a", split="test", images=8, published="2030-01-01T00:00:00Z",
        main_metric="accuracy", metrics={"accuracy": 0.5},
    )  # fmt: skip
    manifest = {"format": 1, "files": {}, "facts": version.model_dump(mode="json")}
    storage.write(f"{versions.version_prefix(name, number)}/manifest.json", json.dumps(manifest).encode())
    return version


def test_concurrent_publishers_get_different_versions(storage):
    with ThreadPoolExecutor(6) as pool:
        claimed = list(pool.map(lambda n: versions.claim_version(storage, "tiny", f"tiny-{n}"), range(6)))
    assert sorted(claimed) == [1, 2, 3, 4, 5, 6]


def test_run_reuses_only_its_own_claim(storage):
    assert versions.claim_version(storage, "tiny", "tiny-aaaa") == 1
    storage.write("models/tiny/1/model.keras", b"half an upload")
    assert versions.claim_version(storage, "tiny", "tiny-bbbb") == 2
    assert versions.claim_version(storage, "tiny", "tiny-aaaa") == 1
    assert [item.key for item in storage.list("models/tiny/1/")] == ["models/tiny/1/claim.json"]


def test_published_version_is_never_claimed_again(storage):
    assert versions.claim_version(storage, "tiny", "tiny-1") == 1
    finish(storage, 1)
    assert versions.claim_version(storage, "tiny", "tiny-1") == 2


def test_latest_never_moves_backwards(storage):
    newer = finish(storage, 2)
    assert versions.update_latest(storage, "tiny") == newer
    finish(storage, 1)
    assert versions.update_latest(storage, "tiny") == newer
    assert versions.read_latest(storage, "tiny") == newer


def test_number_of_a_deleted_version_is_not_reused(storage):
    finish(storage, 1)
    newest = finish(storage, 2)
    versions.update_latest(storage, "tiny")
    storage.delete(["models/tiny/2/manifest.json"])
    assert versions.update_latest(storage, "tiny") == newest
    assert versions.claim_version(storage, "tiny", "tiny-3") == 3


def test_list_models_includes_only_published_versions(storage):
    finish(storage, 1)
    finish(storage, 10)
    finish(storage, 2)
    finish(storage, 1, "another")
    versions.claim_version(storage, "tiny", "tiny-1")
    versions.claim_version(storage, "incomplete", "incomplete-1")
    assert versions.list_models(storage) == {"another": [1], "tiny": [1, 2, 10]}


def test_version_is_found_by_its_key_and_weights(storage):
    first = finish(storage, 1, key="aaaa")
    finish(storage, 2, key="bbbb")
    assert versions.find_version_by_key(storage, "tiny", "aaaa", "0a") == first
    assert versions.find_version_by_key(storage, "tiny", "aaaa", "0b") is None
    assert versions.find_version_by_key(storage, "tiny", "cccc", "0a") is None
