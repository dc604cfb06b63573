"""The base of every part of the spec: frozen, camelCase outside, unknown keys refused."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Part(BaseModel):
    """One mapping of the job spec. Python names are snake_case, YAML keys camelCase."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, validate_by_name=True, strict=False)
