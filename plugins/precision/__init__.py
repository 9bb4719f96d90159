"""Number formats, and the ONNX files and training that realise them, for quantization."""
