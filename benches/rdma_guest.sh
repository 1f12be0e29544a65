#!/bin/bash
# Inside the guest of tests/rdma-vm: a link over each kind of device beside perftest on the same device, a line each:
# KIND WHAT VALUE. Latencies of perftest are one way, in microseconds (t_typical); bandwidths in MB/s.
set -euo pipefail
rayless=$1 seconds=$2
perf() { # KIND TOOL COLUMN ADDRESS DEVICE ARGS..: one run between the device and itself, by rdma_cm as links do
  local kind=$1 tool=$2 column=$3 address=$4 device=$5 value=failed
  shift 5
  for _ in 1 2 3; do
    # Each side is limited: a server whose client failed would wait for ever.
    timeout 60 "$tool" -R -d "$device" "$@" >/run/server 2>&1 & local server=$!
    sleep 2
    if timeout 50 "$tool" -R -d "$device" "$@" "$address" >/run/client 2>&1; then
      value=$(awk -v c="$column" '$1 ~ /^[0-9]+$/ && NF >= 4 {value = $c} END {print value}' /run/client)
      wait $server || true
      break
    fi
    kill $server 2>/dev/null || true
    wait $server || true
  done
  echo "$kind $tool $value"
}
for kind in rxe siw; do
  [ -e "/sys/class/infiniband/${kind}0" ] || continue
  net=77; [ $kind = rxe ] || net=78
  address=10.$net.0.1
  echo "$kind link $("$rayless" bench link --transport rdma --rdma-address "$address" --json --sizes 64,28KiB,64KiB --seconds "$seconds")"
  perf $kind ib_send_lat 5 $address ${kind}0 -s 64 -n 300
  perf $kind ib_write_lat 5 $address ${kind}0 -s 64 -n 300
  perf $kind ib_write_bw 4 $address ${kind}0 -s 65536 -n 200
done
