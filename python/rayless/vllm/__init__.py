"""vLLM on rayless: ``vllm serve MODEL --distributed-executor-backend rayless``.

``plugin`` teaches vLLM the name, ``executor`` is the executor that EngineCore drives, ``worker`` is what it
hosts on every rank, ``environment`` decides what each rank's process sees. Importing this package imports
neither vLLM nor torch: workers learn their devices and threads first.
"""
