#!/usr/bin/env bash
# master 节点：启动集群的 head。对应原文档的 `ray start --head`。
# 用法：bash master.sh；之后用 `docker logs vllm` 查看。
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
. ./common.sh

# 口令只需生成一次；之后复制到 worker 节点的同一路径（例如 scp -p）。
if [ ! -s "$TOKEN_FILE" ]; then
    (umask 077 && docker run --rm --entrypoint /bin/bash -v /root:/root "$IMAGE" \
        -c "pip install -q --no-deps $RAYLESS_WHEEL >&2 && rayless token new" >"$TOKEN_FILE")
    echo "已生成 $TOKEN_FILE：请复制到 worker 节点的同一路径（scp -p $TOKEN_FILE root@WORKER:$TOKEN_FILE）"
fi

# head 在前台运行：它就是容器的主进程，不需要 `tail -f /dev/null`。
run_container "$SETUP
exec rayless head --bind $INTERFACE --token-file $TOKEN_FILE"
