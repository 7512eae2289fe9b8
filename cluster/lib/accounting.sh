#!/bin/bash
# shellcheck disable=SC2154 # slurm, state and daemon are box.sh's
# Slurm's accounting database, sourced by lib/box.sh for `vcluster up --accounting`: MariaDB in the state folder, reached by a
# socket there and by nothing else, slurmdbd, and what an administrator would have entered.

database=$slurm/mariadb

# MariaDB refuses to run as root.
as_database_user() {
    if [ "$(id -u)" = 0 ]; then
        chown -R mysql "$database" && setpriv --reuid=mysql --regid=mysql --clear-groups "$@"
    else
        daemon "$@"
    fi
}

mariadb_answers() { mariadb-admin --no-defaults --socket="$database/socket" ping; }
slurmdbd_answers() { sacctmgr --noheader --parsable2 list cluster; }

start_database() {
    local small=(--innodb-buffer-pool-size=16M --innodb-log-file-size=4M)
    mkdir -p "$database/data" "$database/tmp"
    as_database_user mariadb-install-db --no-defaults "${small[@]}" --skip-test-db --skip-name-resolve \
        --auth-root-authentication-method=normal --datadir="$database/data" > "$slurm/log/mariadb-install.log" 2>&1 || return
    # --skip-grant-tables: whoever reaches the socket may do all; nobody but this machine's daemons does.
    as_database_user mariadbd --no-defaults "${small[@]}" --innodb-lock-wait-timeout=900 --skip-networking \
        --skip-grant-tables --datadir="$database/data" --tmpdir="$database/tmp" --socket="$database/socket" \
        --pid-file="$database/pid" > "$slurm/log/mariadbd.log" 2>&1 &
    until_true 60 mariadb_answers || return
    daemon env MYSQL_UNIX_PORT="$database/socket" slurmdbd || return
    until_true 60 slurmdbd_answers
}

# Accounts: project (the user's default; at most 20 jobs submitted, one day each), small (one job submitted), narrow (2 nodes
# in all), funded (not the user's). QOS: normal (the default), short (10 minutes, 2 nodes a job), urgent (not the user's).
enter_site() {
    local user
    user=$(id -un)
    {
        sacctmgr -i add cluster vcluster
        sacctmgr -i add account project,small,narrow,funded Description=x Organization=x
        sacctmgr -i add qos short MaxWall=10 MaxTRES=node=2
        sacctmgr -i add qos urgent
        sacctmgr -i add user "$user" account=project,small,narrow DefaultAccount=project
        sacctmgr -i modify user "$user" set QOS=normal,short DefaultQOS=normal where account=project,small,narrow
        sacctmgr -i modify user "$user" set MaxSubmitJobs=20 MaxWall=1-0 where account=project
        sacctmgr -i modify user "$user" set MaxSubmitJobs=1 where account=small
        sacctmgr -i modify account narrow set GrpTRES=node=2
    } > "$slurm/log/sacctmgr.log" 2>&1
}

start_accounting() { start_database && enter_site; }
