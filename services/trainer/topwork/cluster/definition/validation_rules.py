"""Which rules of the spec the API server checks, too, and why it cannot check the others."""

from collections.abc import Iterator
from typing import Any

from annotated_types import MaxLen

from topwork.cluster.definition import dataset_rules, job_rules, search_rules, training_rules
from topwork.cluster.definition.cel import CEL_RULES, CelRule, SpecRule, Text, format_string, quote, text
from topwork.spec import compute, dataset, fine_tune, job, splits, stage_rules, training
from topwork.spec.schema.key_types import KeyType, describe_types, expand_types
from topwork.spec.search import transfer_search
from topwork.spec.spec_model import SpecModel, ValueDescription, get_rules
from topwork.spec.uris import ArchiveUri, FolderUri, HttpUrl, ModelUri, StorageUri, TableUri, Weights

RULE_MODULES = (dataset_rules, job_rules, search_rules, training_rules)

_UNION = "{} is a union of types, which CEL cannot read"
_SPLITS, _CACHE = _UNION.format("spec.dataset.splits"), _UNION.format("featureCache")
_UNFREEZE, _LOSS = _UNION.format("spec.fineTune.unfreeze"), _UNION.format("spec.transfer.loss")
_CHOICES = "choices and conditions can have any type, so CEL cannot read them"
NOT_EXPRESSIBLE: dict[SpecRule, str] = {
    **dict.fromkeys(get_rules(splits.Splits), _SPLITS),
    **dict.fromkeys(get_rules(training.Loss), _LOSS),
    **dict.fromkeys(get_rules(training.FeatureCache), _CACHE),
    compute.annotations_are_small: "the number and length of annotations is not limited, so the cost is too high",
    compute.tolerations_match_the_kubernetes_api: "the schema of tolerations checks it",
    compute.affinity_matches_the_kubernetes_api: "the schema of affinity checks it",
    compute.image_pull_secrets_are_unique: "the list type set checks it",
    dataset.limit_of_leaks_is_used: "nearDuplicates has no type, because YAML 1.1 reads off as a boolean",
    dataset.value_range_is_ascending: _UNION.format("spec.dataset.valueRange"),
    dataset.selected_classes_are_unambiguous: _UNION.format("spec.dataset.classes"),
    dataset.column_of_splits_is_used: _SPLITS,
    dataset.column_of_groups_is_in_a_table: _SPLITS,
    dataset.lists_name_files: _SPLITS,
    training.feature_cache_requires_a_frozen_base: _CACHE,
    fine_tune.feature_cache_requires_frozen_layers: _CACHE,
    fine_tune.epochs_are_set_once: _UNFREEZE,
    fine_tune.steps_unfreeze_more_layers: _UNFREEZE,
    job.early_stopping_requires_validation: _SPLITS,
    job.final_model_requires_all_folds: _SPLITS,
    job.calibration_requires_validation: _SPLITS,
    job.cross_validation_does_not_compare_versions: _SPLITS,
    stage_rules.every_view_is_used: _CACHE,
    stage_rules.every_step_of_the_learning_rate_happens: "the defaults of the namespace may set keepCheckpoint",
    stage_rules.feature_cache_excludes_mixing: _CACHE,
    stage_rules.views_require_augmentation: _CACHE,
    stage_rules.mixed_labels_require_a_categorical_loss: _LOSS,
    transfer_search.choices_are_unique: _CHOICES,
    transfer_search.parameters_are_keys_of_the_template: "CEL cannot look up a path in a schema",
    transfer_search.loss_is_the_same_in_all_trials: "CEL cannot look up a path in a schema",
    transfer_search.conditions_can_be_met: _CHOICES,
    transfer_search.values_are_accepted_by_the_template: "CEL cannot validate an object that does not exist",
    transfer_search.trials_are_compared_on_validation: _UNION.format("spec.template.dataset.splits"),
    transfer_search.trials_can_be_continued: _CHOICES,
    transfer_search.cmaes_has_numbers: _CHOICES,
}
"""Rules that only the controller checks, or another part of the schema, each with the reason."""


def rules_of_model(model: type[SpecModel]) -> list[dict[str, Any]]:
    """Return the `x-kubernetes-validations` of a model.

    Raises:
        KeyError: If a rule of the model is neither mirrored in CEL nor listed in `NOT_EXPRESSIBLE`.
    """
    return [
        rule.to_validation(check.__doc__ or "")
        for check in get_rules(model)
        if check not in NOT_EXPRESSIBLE
        for rule in CEL_RULES[check]()
    ]


def rules_of_value(allowed: KeyType) -> list[dict[str, Any]]:
    """Return the `x-kubernetes-validations` of a string, as far as they do not depend on other values."""
    schemes = URI_SCHEMES.get(allowed.find(ValueDescription))
    return [] if schemes is None else [rule.to_validation("The URI is not allowed.") for rule in _uri_rules(schemes)]


def rules_of_name(noun: str) -> list[dict[str, Any]]:
    """Return the `x-kubernetes-validations` of `metadata.name`, relative to the root of a job or search."""
    (allowed,) = expand_types(job.Metadata.model_fields["name"].annotation, job.Metadata.model_fields["name"].metadata)
    pattern = next(item.pattern for item in allowed.metadata if getattr(item, "pattern", None))
    name = "self.metadata.name"
    rule = CelRule(
        f"size({name}) > {allowed.find(MaxLen).max_length} || !{name}.matches({quote(pattern)})",
        text(f"{{}} is not allowed. Allowed: {describe_types([allowed])}.", format_string(name)),
        "metadata.name",
    )
    return [rule.to_validation(f"The name of a {noun} has at most 40 characters: a-z, 0-9 and hyphen.")]


def _description(annotated: Any) -> ValueDescription:
    return next(item for item in annotated.__metadata__ if isinstance(item, ValueDescription))


# Schemes of the URIs in typed fields; empty if any path or keyword is allowed, too.
URI_SCHEMES: dict[ValueDescription, tuple[str, ...]] = {
    _description(StorageUri): ("s3",),
    _description(HttpUrl): ("http", "https"),
    **dict.fromkeys(map(_description, (FolderUri, ArchiveUri, TableUri, ModelUri, Weights)), ()),
}


def _uri_rules(schemes: tuple[str, ...]) -> Iterator[CelRule]:
    """Check what a pattern could check, too, but without the value in the message: it may contain a password."""
    has_user = r'self.matches("^[^/?#]*://[^/?#]*@")'
    has_scheme = r'self.matches("^[A-Za-z][A-Za-z0-9+.-]*:/")'
    is_allowed = f'self.matches("^({"|".join(schemes)})://")'
    messages: list[tuple[str, str | Text]] = [
        (
            has_user,
            "contains a user name or password (not shown here), but specs are stored and shared. Remove it and pass "
            "credentials in environment variables.",
        )
    ]
    if schemes:
        allowed = ", ".join(f"{scheme}://…" for scheme in schemes)
        shown = f'(self.matches("[?@]") ? "the value" : {format_string("self")})'
        messages += [
            (f"!{has_scheme}", text(f"{{}} has no scheme. Allowed: {allowed}.", shown)),
            (f"{has_scheme} && !{is_allowed}", text(f"{{}} is not allowed. Allowed: {allowed}.", shown)),
        ]
    # The API server shows the value with any other reason.
    yield from (CelRule(condition, message, reason="FieldValueForbidden") for condition, message in messages)
