"""Warm-up requests, which TensorFlow Serving runs while it loads a SavedModel."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from keras_proxynorm.export.atomic import local_path, replacing

__all__ = ["write_warm_up_requests"]

# TensorFlow Serving does not load a model that has more.
_MOST_REQUESTS = 1000


def write_warm_up_requests(
    version_directory: str | os.PathLike,
    requests: Sequence[Mapping[str, np.ndarray]],
    *,
    signature_name: str = "serving_default",
    overwrite: bool = False,
) -> Path:
    """Adds requests to a SavedModel that TensorFlow Serving runs while loading it, before it answers any other.

    The first runs of a model are slow, because TensorFlow then optimizes its graph and allocates memory. The requests
    are written to ``assets.extra/tf_serving_warmup_requests`` in the SavedModel's directory. TensorFlow Serving refuses
    a model if one such request fails, so they are compared with the signature here. Their values do not matter: one
    request for each shape that must be fast is enough. :func:`export_saved_model` writes one by itself.

    A server reads the file when it loads the version, and not again. Where a server already watches the directory of
    the model, export to another directory, write the requests, and then move the version into its place.

    Args:
        version_directory: Directory of the SavedModel, as :func:`export_saved_model` returns it.
        requests: List of at most 1000 dicts, each with one array for each input of the signature, by name, in the shape
            and the dtype of the signature.
        signature_name: Name of the signature that the requests are for. Defaults to ``"serving_default"``.
        overwrite: If True, replace the requests that the SavedModel has. Defaults to False.

    Returns:
        The `pathlib.Path` of the file.

    Raises:
        ImportError: If tensorflow-serving-api is not installed.
        ValueError: If there is no SavedModel in `version_directory`, if it has no such signature, or if a request does
            not fit the signature.
        FileExistsError: If the SavedModel has such requests and `overwrite` is False.

    Reference:
        https://www.tensorflow.org/tfx/serving/saved_model_warmup

    Example:

    >>> import tempfile
    >>> import keras, keras_proxynorm, numpy as np
    >>> from keras_proxynorm.export import export_saved_model
    >>> from keras_proxynorm.export.warm_up import write_warm_up_requests
    >>> image = keras.Input((8, 8, 1), name="image")
    >>> features = keras_proxynorm.LayerNormProxy(name="features")(keras.layers.Conv2D(16, 3)(image))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     version = export_saved_model(keras.Model(image, features), directory, warmup=False)
    ...     path = write_warm_up_requests(version, [{"image": np.zeros((1, 8, 8, 1), "float32")}])
    ...     str(path.relative_to(version))
    'assets.extra/tf_serving_warmup_requests'
    """
    import tensorflow as tf

    try:
        from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2
    except ImportError as error:
        raise ImportError("Writing warm-up requests needs: pip install tensorflow-serving-api") from error

    version = local_path("version_directory", version_directory)
    inputs = _signature_inputs(version, signature_name)
    if not isinstance(requests, Sequence) or not 0 < len(requests) <= _MOST_REQUESTS:
        raise ValueError(
            f"Argument `requests` must be a list of 1 to {_MOST_REQUESTS} dicts. Received: "
            + (f"{len(requests)} requests" if isinstance(requests, Sequence) else f"requests={requests!r}")
        )
    # Without a name of the model: the server knows it, and would use another one as a label of its metrics.
    spec = model_pb2.ModelSpec(signature_name=signature_name)
    records = []
    for index, arrays in enumerate(requests):
        request = predict_pb2.PredictRequest(model_spec=spec, inputs=_tensors(index, arrays, inputs))
        log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
        records.append(log.SerializeToString())

    path = version / "assets.extra" / "tf_serving_warmup_requests"
    with replacing(path, overwrite) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
        for record in records:
            writer.write(record)
    return path


def _signature_inputs(version, signature_name):
    """Dtype and shape of each input, read as the server reads them, without loading the model."""
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    file = version / "saved_model.pb"
    if not file.is_file():
        raise ValueError(
            "Argument `version_directory` must be the directory of a SavedModel, with a file saved_model.pb. "
            f"Received: version_directory={str(version)!r}"
        )
    (graph,) = saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs
    # Without the one by which TensorFlow initializes the model.
    names = sorted(set(graph.signature_def) - {"__saved_model_init_op"})
    if signature_name not in names:
        raise ValueError(
            f"Argument `signature_name` must be one of {names}. Received: signature_name={signature_name!r}"
        )
    return {
        name: (tf.as_dtype(info.dtype), tf.TensorShape(info.tensor_shape))
        for name, info in graph.signature_def[signature_name].inputs.items()
    }


def _tensors(index, request, inputs):
    """A request as protos by name, checked against the signature."""
    import tensorflow as tf

    if not isinstance(request, Mapping) or set(request) != set(inputs):
        raise ValueError(
            f"Argument `requests` must have dicts with one array for each of the inputs {sorted(inputs)}. "
            f"Received: requests[{index}] "
            + (f"with {sorted(request)}" if isinstance(request, Mapping) else f"= {request!r}")
        )
    tensors = {name: tf.make_tensor_proto(array) for name, array in request.items()}
    for name, (dtype, shape) in inputs.items():
        given = tf.as_dtype(tensors[name].dtype), tf.TensorShape(tensors[name].tensor_shape)
        if given[0] != dtype or not shape.is_compatible_with(given[1]):
            raise ValueError(
                f"Argument `requests` must have {dtype.name} arrays of shape {shape} for the input {name!r}. "
                f"Received: requests[{index}][{name!r}] of dtype {given[0].name} and shape {given[1]}"
            )
    return tensors
