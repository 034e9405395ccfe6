"""Write the network as an ONNX file, with this project's plug-ins as nodes or in ONNX's own operators alone."""
