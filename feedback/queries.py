"""The query parameters of the routes that list."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from perennial.feedback.records import MAX_NAME_CHARS

MAX_PAGE = 200

# PostgreSQL text cannot hold NUL.
Task = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS, pattern=r"^[^\x00]*$")
]


class PageQuery(BaseModel):
    """Where a page begins and how long it is; a misspelt parameter is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        default=0, description="`next_after` of the last page"
    )
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


class TaskPageQuery(PageQuery):
    """A page of one task, or of all."""

    task: Task | None = None
