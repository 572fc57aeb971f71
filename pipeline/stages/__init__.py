"""One module per kind of stage; each reads straight down: data, models, trainer, fit."""
