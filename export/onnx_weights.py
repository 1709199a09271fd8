"""The weights of an ONNX model: large ones stay NumPy arrays beside it until its file is written."""

import secrets
from pathlib import Path

import numpy as np

__all__ = ["data_files", "initializer", "is_large", "save", "store_as_float16", "value_of"]

# Bytes from which a weight stays an array. Protocol buffers and converters make many copies of what they contain.
_LARGE = 2**18
# Bytes. A file may have 2 GB; the weights of larger models go into a file beside it.
_LARGEST_FILE = 1.5e9
# Bytes that weights begin at multiples of, so that engines can map the file into memory.
_ALIGNMENT = 2**12


def is_large(shape, dtype) -> bool:
    """Whether a weight stays an array."""
    return int(np.prod(shape)) * np.dtype(dtype).itemsize >= _LARGE


def initializer(name: str, value: np.ndarray, arrays: dict[str, np.ndarray]):
    """An `onnx.TensorProto` for a graph; a large value goes into `arrays`, under its name, in place of it."""
    import onnx
    from onnx.model_container import make_large_tensor_proto

    if not is_large(value.shape, value.dtype):
        return onnx.numpy_helper.from_array(value, name)
    arrays[name] = value
    dtype = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return make_large_tensor_proto(f"#{name}", name, dtype, value.shape)


def value_of(tensor, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The value of an initializer."""
    import onnx

    return arrays[tensor.name] if tensor.name in arrays else onnx.numpy_helper.to_array(tensor)


def store_as_float16(proto, arrays: dict[str, np.ndarray]) -> None:
    """Stores the weights that float16 can hold as float16, with casts that an engine computes when it loads them."""
    import onnx

    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        value = value_of(tensor, arrays)
        with np.errstate(over="ignore"):
            half = value.astype("float16")
        if np.array_equal(half, value):
            name = tensor.name
            arrays.pop(name, None)
            tensor.CopyFrom(initializer(f"{name}__float16", half, arrays))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def save(proto, arrays: dict[str, np.ndarray], path: Path, name: str) -> Path | None:
    """Writes a model to `path`, from where it will be moved to a file called `name`.

    Returns:
        The path of a second file, which must be moved to the same directory, with the weights of a large model; or
        None.
    """
    import onnx

    size = proto.ByteSize() + sum(array.nbytes for array in arrays.values())
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in arrays]
    if size < _LARGEST_FILE or not tensors:
        for tensor in tensors:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(arrays.pop(tensor.name)), tensor.name))
        onnx.save_model(proto, path)
        return None
    # Another name each time, so that an old file beside it never reads new weights.
    data = path.with_name(f"{name}-{secrets.token_hex(4)}.data")
    with data.open("xb") as file:
        for tensor in tensors:
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            del tensor.external_data[:]
            entries = {"location": data.name, "offset": file.tell(), "length": arrays[tensor.name].nbytes}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            np.ascontiguousarray(arrays[tensor.name]).tofile(file)
    onnx.save_model(proto, path)
    return data


def data_files(path: Path) -> set[str]:
    """The names of the files beside an ONNX file that have its weights."""
    import onnx

    if not path.exists():
        return set()
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception:  # something else, which is to be overwritten
        return set()
    entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    return {entry.value for entry in entries if entry.value.startswith(f"{path.name}-")}
