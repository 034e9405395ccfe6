"""Define the network with TensorRT-LLM's functions and the RMSNorm plug-ins; see docs/tensorrt_llm.md."""
