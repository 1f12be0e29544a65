# Versions are compared at launch, among the nodes that would hold ranks, and only where both name them.
node a: 8 GPU, vllm=0.32.0, python=3.12.4
node b: 8 GPU, vllm=0.31.1, python=3.12.9
node c: 8 GPU, python=3.11.2
wait 1s
launch here from a: 8 x {GPU:1} with vllm=0.32.0 with python=3.12.4
within 1s expect here placed a:0-7
launch both from b: 9 x {GPU:1} with vllm=0.31.1
within 1s expect both placed b:0-7 c:8
stop here
stop both
wait 1s
launch two from a: 16 x {GPU:1} with vllm=0.32.0
within 1s expect two refused "Policy: vllm differs: the driver on a has 0.32.0, node b has 0.31.1 (hint: run `pip install vllm==0.32.0` on b)"
launch three from a: 24 x {GPU:1} with python=3.12.0
within 1s expect three refused "python differs: the driver on a has 3.12.0, node c has 3.11.2"
expect all free
