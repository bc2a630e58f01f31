"""Prints what the real MLflow exports, as one JSON object; run in an empty folder.

A process of its own: MLflow keeps its tracking store and tracer in globals.
"""

import json
from typing import Any

import mlflow
from mlflow.entities import AssessmentSource


@mlflow.trace(span_type="CHAT_MODEL")  # type: ignore[untyped-decorator]
def ask(messages: list[dict[str, str]]) -> dict[str, Any]:
    span = mlflow.get_current_active_span()
    span.set_attribute("mlflow.llm.model", "shop-7b")
    span.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 7, "output_tokens": 3})
    return {"choices": [{"message": {"role": "assistant", "content": "Two years."}}]}


@mlflow.trace  # type: ignore[untyped-decorator]
def answer(question: str) -> str:
    mlflow.update_current_trace(metadata={"mlflow.trace.user": "u1"})
    ask([{"role": "user", "content": question}])
    return "It is: two years."


def by(kind: str, id: str) -> AssessmentSource:
    return AssessmentSource(source_type=kind, source_id=id)


def main() -> None:
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment("support")
    answer("How long is the warranty?")
    mlflow.flush_trace_async_logging()
    id = mlflow.get_last_active_trace_id()
    robin, judge = by("HUMAN", "robin"), by("LLM_JUDGE", "gpt")
    mlflow.log_feedback(
        trace_id=id, name="helpful", value=False, rationale="It is three.", source=robin
    )
    mlflow.log_feedback(trace_id=id, name="toxic", value=False, source=judge)
    mlflow.log_feedback(trace_id=id, name="stars", value=2, source=by("CODE", "x.py"))
    mlflow.log_expectation(trace_id=id, name="expected_response", value="Three.", source=robin)
    mlflow.log_expectation(trace_id=id, name="expected_facts", value=["three"], source=robin)
    trace = mlflow.get_trace(id)
    exports = {
        "trace": json.loads(trace.to_json()),
        "row": json.loads(mlflow.search_traces().to_json(orient="records", lines=True)),
        "assessment": trace.info.assessments[0].to_dictionary(),
    }
    print(json.dumps(exports))


if __name__ == "__main__":
    main()
