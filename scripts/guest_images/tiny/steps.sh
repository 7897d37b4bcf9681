# What a guest does that has booted (rcS) and one that has resumed (renew).

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root

resolver() { grep -q "nameserver $1\$" /etc/resolv.conf 2>/dev/null || echo "nameserver $1" >>/etc/resolv.conf; }
by_dhcp() { udhcpc -i "$1" -s /etc/udhcpc.sh -t 12 -T 1 -b -x "hostname:$name" -O mtu -O search -O staticroutes -p "/run/udhcpc.$1.pid" >/dev/null 2>&1; }
log_in() { dropbear -R -s -p 22 2>/dev/null; }

wait_for_interfaces() {
    # An interface that is plugged in later asks by DHCP; busybox has no udev to tell us. Its index is its identity:
    # out and in again between two looks, the name would be the same.
    cat /sys/class/net/*/ifindex >/run/interfaces
    (while sleep 1; do
        for entry in /sys/class/net/*; do
            index=$(cat "$entry/ifindex") || continue
            grep -qx "$index" /run/interfaces && continue
            echo "$index" >>/run/interfaces
            interface=${entry##*/}
            ip link set "$interface" up && by_dhcp "$interface"
            echo "SF-GUEST-INTERFACE $interface $(ip -4 -o address show dev "$interface" | awk '{ sub("/.*", "", $4); print $4 }')"
        done
    done >/dev/ttyS0 2>&1) &
    echo $! >/run/waits.pid
}

run_user_data() {
    if [ "$(head -c 2 /run/user_data 2>/dev/null)" = '#!' ]; then
        chmod 700 /run/user_data
        (/run/user_data; echo "SF-GUEST-USER-DATA-DONE $?") </dev/null >/dev/ttyS0 2>&1 &
    elif grep -q '^Content-Type: multipart/' /run/user_data 2>/dev/null; then
        # Of what cloud-init takes: scripts in base64, one after another, then off if all ended well and a part says so.
        (
            code=0
            boundary=$(sed -n 's/^Content-Type: multipart.*boundary="\(.*\)"/\1/p' /run/user_data)
            awk -v line="--$boundary" '$0 == line || $0 == line "--" { n++; body = 0; next }
                body && n { print >("/run/part." n) } $0 == "" { body = 1 }' /run/user_data
            for part in /run/part.*; do
                base64 -d "$part" >"$part.plain" && chmod 700 "$part.plain"
                [ "$(head -c 2 "$part.plain")" != '#!' ] || "$part.plain" || code=$?
            done
            echo "SF-GUEST-USER-DATA-DONE $code"
            [ $code != 0 ] || ! grep -q '^power_state:' /run/part.*.plain || { sync; poweroff; }
        ) </dev/null >/dev/ttyS0 2>&1 &
    fi
}
