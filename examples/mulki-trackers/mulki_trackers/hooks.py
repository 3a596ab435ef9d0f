"""The parts that this package adds to MulKI."""

from mulki_plugins import hookimpl


@hookimpl
def mulki_register(register):
    register.logger("wandb", "mulki_trackers.wandb_logger:WandbLogger", summary="Weights & Biases")
    register.logger("mlflow", "mulki_trackers.mlflow_logger:MlflowLogger", summary="an MLflow server or folder")
