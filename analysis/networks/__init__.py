"""Build networks from a description of their architecture and a safetensors file."""
