"""Stream an answer from Triton with NVIDIA's client: pip install "tritonclient[grpc]".

python client.py ["A question"] [HOST:PORT]
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

QUESTION = sys.argv[1] if len(sys.argv) > 1 else "What is recursion?"
URL = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:8001"


def tensor(name: str, datatype: str, array: np.ndarray) -> tritonclient.grpc.InferInput:
    """Return an input of a request."""
    value = tritonclient.grpc.InferInput(name, list(array.shape), datatype)
    value.set_data_from_numpy(array)
    return value


def main() -> None:
    """Ask one question."""
    messages = json.dumps([{"role": "user", "content": QUESTION}])
    inputs = [
        tensor("messages", "BYTES", np.array([messages.encode()], np.object_)),
        tensor("stream", "BOOL", np.array([True])),
        tensor("max_tokens", "INT32", np.array([128], np.int32)),
    ]
    responses: queue.SimpleQueue = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(URL) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer("qwen", inputs)
        reason = ""
        while not reason:
            result, error = responses.get()
            if error is not None:
                raise error
            print(result.as_numpy("text_output")[0].decode(), end="", flush=True)
            reason = result.as_numpy("finish_reason")[0].decode()
    print(f"\n({reason})")


try:
    main()
except InferenceServerException as error:
    sys.exit(f"{URL}: {error.message()}")
