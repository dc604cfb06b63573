"""Every kind of mistake in a spec, with the exact position and message that the user sees."""
# ruff: noqa: E501 - each row is a change to the valid spec and all problems that it causes
# fmt: off

from pathlib import Path

import pytest

from topwork.spec.applications import MIN_SIDE
from topwork.spec.loading.loader import read_text
from topwork.spec.loading.problems import InvalidSpecError

VALID = Path(__file__).with_name("valid_spec.yaml").read_text(encoding="utf-8")
APPLICATIONS = ", ".join(MIN_SIDE)

MISTAKES: list[tuple[dict[str, str], list[str]]] = [
    ({"    epochs: 20": "    epoch: 20"}, ["26:5: spec.transfer.epoch: unknown key. Did you mean epochs? Known keys: train, epochs, batchSize, optimizer, loss, classWeights, earlyStopping, featureCache.", ]),
    ({"    batchSize: 64": "    batch_size: 64"}, ["27:5: spec.transfer.batch_size: unknown key. Did you mean batchSize? Known keys: train, epochs, batchSize, optimizer, loss, classWeights, earlyStopping, featureCache.", ]),
    ({"  seed: 42": "  sed: 42"}, ["51:3: spec.sed: unknown key. Did you mean seed? Known keys: storage, dataset, model, augmentation, transfer, fineTune, evaluate, publish, compute, metrics, seed.", ]),
    ({"kind: TransferJob\n": ""}, ["2:1: kind: is required. Kind of the object. Allowed: TransferJob.", ]),
    ({"  name: cats-vs-dogs\n": ""}, ["4:1: metadata.name: is required. Name of the job, its dataset and, unless spec.publish.name is set, its model. Allowed: a DNS-1123 label: a-z, 0-9 and hyphen, starting and ending with a letter or digit, at most 40 characters.", ]),
    ({"    imageSize: [150, 150]\n": ""}, ["9:3: spec.dataset.imageSize: is required. Height and width in pixels to which every image is resized. Allowed: a list of 2, each an integer from 16 to 2048.", ]),
    ({"    epochs: 20": "    epochs: 20\n    epochs: 30"}, ["27:5: spec.transfer.epochs: duplicate key, already set on line 26. Remove one of them.", ]),
    ({"  seed: 42": "  1: 42"}, ["51:3: spec.1: a key must be a string, but found 1. Add quotes.", ]),
    ({"  seed: 42": "  seed: 42\n  <<: {}"}, ["52:3: spec.<<: merge keys (<<) are not supported. Write out the keys.", ]),
    ({"  seed: 42": "  seed: 42\n  ? [a]\n  : 1"}, ["52:5: spec.?: a key must be a string, but found a collection. Add quotes.", ]),
    ({"    epochs: 20": '    epochs: "20"'}, ['26:13: spec.transfer.epochs: "20" is not allowed. Remove the quotes. Allowed: an integer from 1 to 10000.', ]),
    ({"    epochs: 20": "    epochs: twenty"}, ['26:13: spec.transfer.epochs: "twenty" is not allowed. Allowed: an integer from 1 to 10000.', ]),
    ({"    epochs: 20": "    epochs: 20.0"}, ["26:13: spec.transfer.epochs: 20.0 is not allowed. Allowed: an integer from 1 to 10000.", ]),
    ({"    epochs: 20": "    epochs: true"}, ["26:13: spec.transfer.epochs: true is not allowed. Allowed: an integer from 1 to 10000.", ]),
    ({"    epochs: 20": "    epochs:"}, ["26:5: spec.transfer.epochs: null is not allowed. Allowed: an integer from 1 to 10000. Or remove the key.", ]),
    ({"    epochs: 20": "    epochs: [20]"}, ["26:13: spec.transfer.epochs: a list of 1 is not allowed. Allowed: an integer from 1 to 10000.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: 150"}, ["16:16: spec.dataset.imageSize: 150 is not allowed. Allowed: a list of 2, each an integer from 16 to 2048.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150]"}, ["16:16: spec.dataset.imageSize: a list of 1 is not allowed. Allowed: a list of 2, each an integer from 16 to 2048.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 150, 3]"}, ["16:16: spec.dataset.imageSize: a list of 3 is not allowed. Allowed: a list of 2, each an integer from 16 to 2048.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 150]\n    audit: {maxLeakRatio: 0.01}"}, ["17:27: spec.dataset.audit.maxLeakRatio: is used only with nearDuplicates: fail, but that is warn. Set nearDuplicates: fail, or remove maxLeakRatio.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 150]\n    audit: {nearDuplicates: fail, maxLeakRatio: 2}"}, ["17:49: spec.dataset.audit.maxLeakRatio: 2 is not allowed. Allowed: a number from 0 to 1.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 150]\n    audit: {labelIssues: drop}"}, ['17:26: spec.dataset.audit.labelIssues: "drop" is not allowed. Allowed: report, off.', ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, wide]"}, ['16:22: spec.dataset.imageSize[1]: "wide" is not allowed. Allowed: an integer from 16 to 2048.', ]),
    ({"    head: {pooling: avg, hidden: [], dropout: 0.2}": "    head: avg"}, ['22:11: spec.model.head: "avg" is not allowed. Allowed: a mapping with pooling, hidden, dropout.', ]),
    ({"  seed: 42": "  seed: 2001-01-01"}, ['51:9: spec.seed: "2001-01-01" is not allowed. Allowed: an integer from 0 to 2147483647.', ]),
    ({"name: adam, learningRate: 0.001}": "name: adam, learningRate: '0.001'}"}, ['28:43: spec.transfer.optimizer.learningRate: "0.001" is not allowed. Remove the quotes. Allowed: a number above 0 and at most 10.', ]),
    ({"name: adam, learningRate: 0.001}": "name: sgd, momentum: 0.9, nesterov: yes, learningRate: 0.001}"}, ['28:53: spec.transfer.optimizer.nesterov: "yes" is not allowed. Did you mean true? Allowed: true or false.', ]),
    ({"name: adam, learningRate: 0.001}": "name: adam, learningRate: .nan}"}, ["28:43: spec.transfer.optimizer.learningRate: nan is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({"name: adam, learningRate: 0.001}": "name: adam, learningRate: 1e999}"}, ["28:43: spec.transfer.optimizer.learningRate: inf is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({"    loss: auto": "    loss: 3"}, ["29:11: spec.transfer.loss: 3 is not allowed. Allowed: auto, binaryCrossentropy, categoricalCrossentropy, sparseCategoricalCrossentropy, focal or a mapping with name, labelSmoothing, gamma.", ]),
    ({"    loss: auto": "    loss: focl"}, ['29:11: spec.transfer.loss: "focl" is not allowed. Did you mean focal? Allowed: auto, binaryCrossentropy, categoricalCrossentropy, sparseCategoricalCrossentropy, focal or a mapping with name, labelSmoothing, gamma.', ]),
    ({"    loss: auto": "    loss: {name: focal, gama: 3}"}, ["29:25: spec.transfer.loss.gama: unknown key. Did you mean gamma? Known keys: name, labelSmoothing, gamma.", ]),
    ({"    unfreeze: all": "    unfreeze: everything"}, ['34:15: spec.fineTune.unfreeze: "everything" is not allowed. Allowed: all, {layers: n}, {from: name} or {steps: […]}.', ]),
    ({"    unfreeze: all": "    unfreeze: 20"}, ["34:15: spec.fineTune.unfreeze: 20 is not allowed. Allowed: all, {layers: n}, {from: name} or {steps: [\u2026]}.", ]),
    ({"    unfreeze: all": "    unfreeze: {layer: 20}"}, ['34:15: spec.fineTune.unfreeze: a mapping with "layer" is not allowed. Allowed: all, {layers: n}, {from: name} or {steps: […]}.', ]),
    ({"    unfreeze: all": "    unfreeze: {layers: few}"}, ['34:24: spec.fineTune.unfreeze.layers: "few" is not allowed. Allowed: an integer from 1 to 10000.', ]),
    ({"    unfreeze: all": "    unfreeze: {from: 3}"}, ["34:22: spec.fineTune.unfreeze.from: 3 is not allowed. Allowed: the name of a layer of the base.", ]),
    ({"    cpu: 8": "    cpu: lots"}, ['45:10: spec.compute.cpu: "lots" is not allowed. Allowed: a number of cores above 0 and at most 1024, or a Kubernetes quantity such as 500m.', ]),
    ({"    cpu: 8": "    cpu: 0"}, ["45:10: spec.compute.cpu: 0 is not allowed. Allowed: a number of cores above 0 and at most 1024, or a Kubernetes quantity such as 500m.", ]),
    ({"  labels: {team: vision}": "  labels: {team: 7}"}, ["6:18: metadata.labels.team: 7 is not allowed. Allowed: a Kubernetes label value: at most 63 letters, digits, hyphens, underscores and dots; quote numbers.", ]),
    ({"  labels: {team: vision}": "  labels: {-team: vision}"}, ['6:12: metadata.labels.-team: "-team" is not allowed as a key. Allowed: a Kubernetes label key: [prefix/]name, where name has at most 63 letters, digits, hyphens, underscores and dots.', ]),
    ({"    gpus: 2": "    gpus: 99"}, ["44:11: spec.compute.gpus: 99 is not allowed. Allowed: an integer from 0 to 16.", ]),
    ({"    gpus: 2": "    gpus: -1"}, ["44:11: spec.compute.gpus: -1 is not allowed. Allowed: an integer from 0 to 16.", ]),
    ({"  seed: 42": "  seed: 99999999999999999999"}, ["51:9: spec.seed: 99999999999999999999 is not allowed. Allowed: an integer from 0 to 2147483647.", ]),
    ({"dropout: 0.2}": "dropout: 1.0}"}, ["22:47: spec.model.head.dropout: 1.0 is not allowed. Allowed: a number from 0 to below 1.", ]),
    ({"learningRate: 0.001}": "learningRate: 0}"}, ["28:43: spec.transfer.optimizer.learningRate: 0 is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({"apiVersion: topwork.dev/v1alpha1": "apiVersion: topwork.dev/v1"}, ['2:13: apiVersion: "topwork.dev/v1" is not allowed. Did you mean topwork.dev/v1alpha1? Allowed: topwork.dev/v1alpha1.', ]),
    ({"  name: cats-vs-dogs\n": "  name: Cats_vs_Dogs\n"}, ['5:9: metadata.name: "Cats_vs_Dogs" is not allowed. Allowed: a DNS-1123 label: a-z, 0-9 and hyphen, starting and ending with a letter or digit, at most 40 characters.', ]),
    ({"    onCorruptImage: skip": "    onCorruptImage: skp"}, ['17:21: spec.dataset.onCorruptImage: "skp" is not allowed. Did you mean skip? Allowed: skip, fail.', ]),
    ({"application: Xception": "application: Xeption"}, ['20:20: spec.model.base.application: "Xeption" is not allowed. Did you mean Xception? Allowed: {APPLICATIONS}.', ]),
    ({"application: Xception": "application: resnet-50"}, ['20:20: spec.model.base.application: "resnet-50" is not allowed. Did you mean ResNet50? Allowed: {APPLICATIONS}.', ]),
    ({"[accuracy, top5, f1, auc]": "[accuracy, top-5, f1, auc]"}, ['37:25: spec.evaluate.metrics[1]: "top-5" is not allowed. Did you mean top5? Allowed: accuracy, top5, precision, recall, f1, auc, calibrationError.', ]),
    ({"formats: [keras, savedModel]": "formats: [keras, tf-lite]"}, ['42:50: spec.publish.formats[1]: "tf-lite" is not allowed. Did you mean tflite? Allowed: keras, savedModel, tflite, onnx.', ]),
    ({"formats: [keras, savedModel]": "formats: []"}, ["42:42: spec.publish.formats: a list of 0 is not allowed. Allowed: a list of at least 1, each keras, savedModel, tflite, onnx.", ]),
    ({"atLeast: 0.95": "atLeast: 95"}, ["39:37: spec.evaluate.gates[0].atLeast: 95 is not allowed. Allowed: a number from 0 to 1.", ]),
    ({"    memory: 32Gi": "    memory: 32"}, ["46:13: spec.compute.memory: 32 is not allowed. Allowed: a Kubernetes quantity with its unit, such as 16Gi or 500M.", ]),
    ({"    memory: 32Gi": "    memory: 32GB"}, ['46:13: spec.compute.memory: "32GB" is not allowed. Allowed: a Kubernetes quantity with its unit, such as 16Gi or 500M.', ]),
    ({"tfds: cats_vs_dogs": "tfds: Cats vs dogs"}, ['11:13: spec.dataset.source.tfds: "Cats vs dogs" is not allowed. Allowed: name[/config][:version], such as cats_vs_dogs or cats_vs_dogs:4.0.1.', ]),
    ({"s3://ml-artifacts/topwork": "gs://ml-artifacts/topwork"}, ['8:12: spec.storage: "gs://ml-artifacts/topwork" is not allowed. Allowed: s3://….', ]),
    ({"s3://ml-artifacts/topwork": "/data/topwork"}, ['8:12: spec.storage: "/data/topwork" has no scheme. Allowed: s3://….', ]),
    ({"s3://ml-artifacts/topwork": "s3://m/topwork"}, ['8:12: spec.storage: "m" is not a bucket name. Use 3 to 63 characters of a-z, 0-9, dot and hyphen.', ]),
    ({"s3://ml-artifacts/topwork": "s3://ml-artifacts//topwork"}, ['8:12: spec.storage: "s3://ml-artifacts//topwork" has an empty segment, . or .. in its key.', ]),
    ({"s3://ml-artifacts/topwork": "s3://key:hush-hush@ml-artifacts/topwork"}, ["8:12: spec.storage: contains a user name or password (not shown here), but specs are stored and shared. Remove it and pass credentials in environment variables.", ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: 'https://host/cats.zip?X-Amz-Signature=hush-hush'}"}, ["11:22: spec.dataset.source.archive.uri: is signed or has a secret in its query (X-Amz-Signature, not shown here), but specs are stored and shared. Copy the file to S3 and use s3://bucket/key.", ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: s3://bucket/cats.rar}"}, ['11:22: spec.dataset.source.archive.uri: "s3://bucket/cats.rar" does not end in one of .zip, .tar, .tar.gz, .tgz, .tar.bz2, .tbz2, .tar.xz, .txz.', ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: cats.zip, root: ../PetImages}"}, ['11:38: spec.dataset.source.archive.root: "../PetImages" is outside the archive. Remove the .. segments.', ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: cats.zip, sha256: 1234}"}, ["11:40: spec.dataset.source.archive.sha256: 1234 is not allowed. Allowed: 64 lowercase hex digits, as printed by sha256sum.", ]),
    ({"tfds: cats_vs_dogs": "folder: {uri: https://host/cats/}"}, ['11:21: spec.dataset.source.folder.uri: "https://host/cats/" is not allowed. Allowed: s3://…, a local path.', ]),
    ({"tfds: cats_vs_dogs": "table: {uri: s3://bucket/labels.xlsx}"}, ['11:20: spec.dataset.source.table.uri: "s3://bucket/labels.xlsx" does not end in one of .csv, .jsonl, .ndjson.', ]),
    ({"tfds: cats_vs_dogs": "table: {uri: labels.csv, image: path, label: path}"}, ['11:52: spec.dataset.source.table.label: "path" is also set as spec.dataset.source.table.image. Name the column with the class.', ]),
    ({"pushgateway: null": "pushgateway: http://admin:hush-hush@gateway:9091"}, ["50:26: spec.metrics.pushgateway: contains a user name or password (not shown here), but specs are stored and shared. Remove it and pass credentials in environment variables.", ]),
    ({"onCorruptImage: skip": "onCorruptImage: https://me:hush-hush@host/a?token=hush-hush"}, ['17:21: spec.dataset.onCorruptImage: "https…host/a…" is not allowed. Allowed: skip, fail.', ]),
    ({"pushgateway: null": "pushgateway: gateway:9091"}, ['50:26: spec.metrics.pushgateway: "gateway:9091" has no scheme. Allowed: http://…, https://….', ]),
    ({"      tfds: cats_vs_dogs": "      tfds: cats_vs_dogs\n      folder: {uri: photos}"}, ["10:5: spec.dataset.source: tfds and folder are set, but exactly one of tfds, folder, archive and table is required.", ]),
    ({"      tfds: cats_vs_dogs": "      {}"}, ["11:7: spec.dataset.source: none is set, but exactly one of tfds, folder, archive and table is required.", ]),
    ({"      application: Xception\n      weights: imagenet": "      {}"}, ["20:7: spec.model.base: none is set, but exactly one of application, saved and cnn is required.", ]),
    ({"      application: Xception\n": "      saved: {uri: base.keras}\n"}, ["21:16: spec.model.base.weights: applies only to application: a saved model includes its weights, and a cnn starts from random weights. Remove it.", ]),
    ({"      weights: imagenet": "      weights: image-net"}, ['21:16: spec.model.base.weights: "image-net" is not allowed. Did you mean imagenet? Allowed: imagenet, none, or s3://bucket/key or a local path, ending in .h5.', ]),
    ({"      weights: imagenet": "      weights: imagenet\n      cutAt: 3"}, ["22:7: spec.model.base.cutAt: unknown key. It is a key of spec.model.base.saved. Known keys: application, weights, saved, cnn.", ]),
    ({"      train: train[:40%]": "      train: train[40%]"}, ['13:14: spec.dataset.splits.train: "train[40%]" is not a TFDS slice. Allowed: train, train[:40%], train[100:200], joined by +.', ]),
    ({"      train: train[:40%]": "      train: train[:40.5%]"}, ['13:14: spec.dataset.splits.train: "40.5%" in "train[:40.5%]" is not a boundary. Use a number of images or a whole percentage.', ]),
    ({"      train: train[:40%]": "      train: train[:140%]"}, ['13:14: spec.dataset.splits.train: "140%" in "train[:140%]" is more than 100%.', ]),
    ({"      train: train[:40%]": "      train: train[60%:40%]"}, ['13:14: spec.dataset.splits.train: "train[60%:40%]" contains no images: its end is not after its start.', ]),
    ({"      train: train[:40%]": "      train: train[:30%]+train[20%:40%]"}, ["13:14: spec.dataset.splits.train: train[:30%] and train[20%:40%] overlap: the same images would be used twice.", ]),
    ({"      train: train[:40%]": "      train: 0.4"}, ["14:19: spec.dataset.splits.validation: train[40%:50%] is a slice, but train is the fraction 0.4 of all images. Use only fractions or only slices.", ]),
    ({"      train: train[:40%]": "      train: '0.4'"}, ['13:14: spec.dataset.splits.train: "0.4" is text. Write a fraction as a number, such as 0.8.', ]),
    ({"      train: train[:40%]": "      train: 40%"}, ['13:14: spec.dataset.splits.train: "40%" is text. Write a fraction as a number, such as 0.8.', ]),
    ({"      train: train[:40%]": "      train: 80"}, ["13:14: spec.dataset.splits.train: 80 is not allowed. Allowed: a fraction above 0 and below 1, such as 0.8 or TFDS slicing, such as train, train[:40%] or train[100:]+test[:-50].", ]),
    ({"      train: train[:40%]\n      validation: train[40%:50%]\n      test: train[50%:60%]\n": "      train: 0.8\n      validation: 0.2\n      test: 0.1\n"}, ["13:14: spec.dataset.splits.train: 0.8 + 0.2 + 0.1 is 1.1, but the fractions of all splits must add up to at most 1.", ]),
    ({"      train: train[:40%]": "      stratify: false\n      train: train[:40%]"}, ["13:17: spec.dataset.splits.stratify: applies only to fractions, such as train: 0.8. Remove it, or use fractions.", ]),
    ({"      train: train[:40%]": "      train: all"}, ["13:14: spec.dataset.splits.train: 'all' combines every split. Name the splits, such as train+test.", ]),
    ({"      train: train[:40%]": "      train: train[:45%]"}, ["14:19: spec.dataset.splits.validation: train[40%:50%] overlaps train: train[:45%]. Shared images make the metrics too optimistic. Choose slices that do not overlap.", ]),
    ({"      test: train[50%:60%]": "      test: train[-55%:]"}, ["15:13: spec.dataset.splits.test: train[-55%:] overlaps validation: train[40%:50%]. Shared images make the metrics too optimistic. Choose slices that do not overlap.", ]),
    ({"      train: train[:40%]\n": ""}, ["12:5: spec.dataset.splits.train: is required. Set a fraction, such as train: 0.8, or use perClass.", ]),
    ({"      validation: train[40%:50%]\n      test: train[50%:60%]\n": ""}, ["12:5: spec.dataset.splits.test: is required if there is no validation split. Set it, such as test: train[80%:].", "28:20: spec.transfer.earlyStopping: monitors the validation loss, but there is no validation split. Add spec.dataset.splits.validation, or remove earlyStopping.", ]),
    ({"      test: train[50%:60%]": "      perClass: {train: 10, test: 5}"}, ["15:17: spec.dataset.splits.perClass: cannot be combined with train and validation. Use either counts per class, fractions or slices.", ]),
    ({"      train: train[:40%]\n      validation: train[40%:50%]\n      test: train[50%:60%]\n": "      perClass: {train: 0, test: 5}\n"}, ["13:25: spec.dataset.splits.perClass.train: 0 is not allowed. Allowed: an integer from 1.", "28:20: spec.transfer.earlyStopping: monitors the validation loss, but there is no validation split. Add spec.dataset.splits.validation, or remove earlyStopping.", ]),
    ({"    train: head": "    train: all", "featureCache: auto": "featureCache: on"}, ["31:19: spec.transfer.featureCache: on requires a frozen base, but train is all. Set featureCache: auto, or train: head.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, momentum: 0.9}"}, ["28:60: spec.transfer.optimizer.momentum: 0.9 applies only to rmsprop and sgd, not to adam. Remove it or change the name.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: sgd, learningRate: 0.001, nesterov: true}"}, ["28:59: spec.transfer.optimizer.nesterov: true requires momentum, which is 0. Set momentum, such as 0.9.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, clipnorm: 1, clipvalue: 1}"}, ["28:74: spec.transfer.optimizer.clipvalue: cannot be combined with clipnorm: Keras supports one clipping method. Keep one of them.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: step, factor: 0.1}}"}, ["28:60: spec.transfer.optimizer.schedule.atEpochs: is required if name is step. With step: epochs, counted from 1, after which the learning rate drops.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: constant, warmupEpochs: 1}}"}, ["28:91: spec.transfer.optimizer.schedule.warmupEpochs: 1.0 applies only to cosine, not to constant. Remove it or change the name.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: cosine, warmupEpochs: 20}}"}, ["28:89: spec.transfer.optimizer.schedule.warmupEpochs: 20.0 is not below epochs 20, so the warmup would never reach the learning rate. Try a tenth of the epochs.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: exponential, rate: 1.5}}"}, ["28:86: spec.transfer.optimizer.schedule.rate: 1.5 is not below 1, so the learning rate would never decrease. Try 0.9.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: step, factor: 0.1, atEpochs: [9, 5]}}"}, ["28:100: spec.transfer.optimizer.schedule.atEpochs[1]: 5 is not above the previous epoch 9. List epochs in ascending order.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: step, factor: 0.1, atEpochs: [9, 30]}}"}, ["28:100: spec.transfer.optimizer.schedule.atEpochs[1]: 30 is not before the last epoch, 20, so this step would never happen. Remove it.", ]),
    ({"    loss: auto": "    loss: {name: sparseCategoricalCrossentropy, labelSmoothing: 0.1}"}, ["29:65: spec.transfer.loss.labelSmoothing: 0.1 is not supported with sparseCategoricalCrossentropy, whose labels are class indices. Use categoricalCrossentropy, which is otherwise equivalent.", ]),
    ({"    loss: auto": "    loss: {name: auto, gamma: 3}"}, ["29:31: spec.transfer.loss.gamma: 3.0 applies only to focal, not to auto. Remove it or use focal.", ]),
    ({"    epochs: 10\n": ""}, ["32:3: spec.fineTune.epochs: is required. Set the maximum number of epochs of this stage.", ]),
    ({"    unfreeze: all": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 1e-5}]}"}, ["33:13: spec.fineTune.epochs: 10 cannot be combined with unfreeze.steps, which set their own epochs. Remove it.", ]),
    ({"    epochs: 10\n    unfreeze: all": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 1e-5}, {layers: 4, epochs: 2, learningRate: 1e-6}]}"}, ["33:77: spec.fineTune.unfreeze.steps[1].layers: 4 is not above 4 of the previous step. Layers are always counted from the top, so each step needs a higher number.", ]),
    ({"    epochs: 10\n    unfreeze: all\n    optimizer: {name: adam, learningRate: 1.0e-5}": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 1e-5}]}\n    optimizer: {schedule: {name: cosine, warmupEpochs: 2}}"}, ["34:56: spec.fineTune.optimizer.schedule.warmupEpochs: 2.0 is not below epochs 2 of the shortest step, so the warmup would never reach the learning rate. Try a tenth of the epochs.", ]),
    ({"{name: adam, learningRate: 1.0e-5}": "{name: adam}"}, ["35:16: spec.fineTune.optimizer.learningRate: is required. The default of 0.001 suits a new head but destroys pretrained weights. Try 1e-05.", ]),
    ({"    batchSize: 64": "    batchSize: 65"}, ["27:16: spec.transfer.batchSize: 65 is not divisible by spec.compute.gpus 2, but each replica processes an equal part of the global batch. Try 64 or 66.", ]),
    ({"    gpus: 2": "    gpus: 3"}, ["27:16: spec.transfer.batchSize: 64 is not divisible by spec.compute.gpus 3, but each replica processes an equal part of the global batch. Try 63 or 66.", ]),
    ({"    unfreeze: all": "    unfreeze: all\n    batchSize: 1"}, ["35:16: spec.fineTune.batchSize: 1 is not divisible by spec.compute.gpus 2, but each replica processes an equal part of the global batch. Try 2.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, gradientAccumulationSteps: 4}"}, ["28:77: spec.transfer.optimizer.gradientAccumulationSteps: 4 is not supported with spec.compute.gpus 2: Keras crashes when it accumulates gradients over several replicas (keras#20582). Remove it, or set gpus: 1.", ]),
    ({"    unfreeze: all": "    unfreeze: all\n    keep: first"}, ['35:11: spec.fineTune.keep: "first" is not allowed. Allowed: best, last.', ]),
    ({"    unfreeze: all": "    unfreeze: all\n    keep: Best"}, ['35:11: spec.fineTune.keep: "Best" is not allowed. Did you mean best? Allowed: best, last.', ]),
    ({"    epochs: 20": "    epochs: 20\n    keep: best"}, ["27:5: spec.transfer.keep: unknown key. It is a key of spec.fineTune. Known keys: train, epochs, batchSize, optimizer, loss, classWeights, earlyStopping, featureCache.", ]),
    ({"{name: adam, learningRate: 1.0e-5}": "{name: adam, learningRate: 0.1}"}, ["35:43: spec.fineTune.optimizer.learningRate: 0.1 is above spec.transfer.optimizer.learningRate 0.001. A higher learning rate destroys pretrained weights. Try a tenth of it, 0.0001.", ]),
    ({"    epochs: 10\n    unfreeze: all": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 0.01}]}"}, ["33:61: spec.fineTune.unfreeze.steps[0].learningRate: 0.01 is above spec.transfer.optimizer.learningRate 0.001. A higher learning rate destroys pretrained weights. Try a tenth of it, 0.0001.", ]),
    ({"      validation: train[40%:50%]\n": ""}, ["29:20: spec.transfer.earlyStopping: monitors the validation loss, but there is no validation split. Add spec.dataset.splits.validation, or remove earlyStopping.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 64]"}, ["16:22: spec.dataset.imageSize[1]: 64 is too small for Xception, which needs at least 71 pixels.", ]),
    ({"      application: Xception\n      weights: imagenet": "      cnn: {filters: [32, 64]}"}, ["24:12: spec.transfer.train: head would freeze the cnn at its random weights. Set train: all.", ]),
    ({"rotation: 0.1}": "rotation: 0.1, mixUp: 0.2, cutMix: 1.0}"}, ["23:71: spec.augmentation.cutMix: cannot be combined with mixUp: both mix the same images and labels. Set one of them to 0.", ]),
    ({"rotation: 0.1}": "rotation: 0.1, mixUp: 0.2}", "loss: auto": "loss: sparseCategoricalCrossentropy"}, ["23:58: spec.augmentation.mixUp: 0.2 mixes two labels, but sparseCategoricalCrossentropy expects a single class index. Set spec.transfer.loss to categoricalCrossentropy or auto, or set mixUp to 0.", ]),
    ({"atLeast: 0.95": "atMost: 0.5, atLeast: 0.9"}, ["39:36: spec.evaluate.gates[0].atMost: 0.5 is below atLeast 0.9, so no model can meet both. Swap or change them.", ]),
    ({"{metric: accuracy, atLeast: 0.95}": "{metric: accuracy}"}, ["39:9: spec.evaluate.gates[0]: has no condition. Set at least one of atLeast, atMost and atLeastLatestMinus.", ]),
    ({"{metric: accuracy, atLeast: 0.95}": "{metric: recall, atLeast: 0.95}"}, ["39:18: spec.evaluate.gates[0].metric: recall is not in spec.evaluate.metrics: accuracy, top5, f1, auc. Add it there.", ]),
    ({"{metric: accuracy, atLeast: 0.95}": "{metric: calibrationError, atLeast: 0.95}"}, ["39:45: spec.evaluate.gates[0].atLeast: 0.95 requires a high calibrationError, but lower is better. Use atMost.", ]),
    ({"[accuracy, top5, f1, auc]": "[accuracy, top5, f1, auc, f1]"}, ["37:40: spec.evaluate.metrics[4]: f1 is listed twice. Remove one of them.", ]),
    ({"    sharedMemory: 2Gi": "    sharedMemory: 64Gi"}, ["47:19: spec.compute.sharedMemory: 64Gi is not below spec.compute.memory 32Gi, which includes it. Raise memory or lower sharedMemory.", ]),
    ({"operator: Exists,": "operator: Exist,"}, ['49:51: spec.compute.tolerations[0].operator: "Exist" is not allowed. Did you mean Exists? Allowed: Equal, Exists.', ]),
    ({"operator: Exists,": "operator: Exists, value: a, second: 3,"}, ["49:66: spec.compute.tolerations[0].value: cannot be combined with operator Exists. Remove one of them.", "49:77: spec.compute.tolerations[0].second: unknown key. Known keys: key, operator, value, effect, tolerationSeconds.", ]),
    ({'{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}': "{effect: NoSchedule, tolerationSeconds: '3'}"}, ["49:19: spec.compute.tolerations[0]: has no key. Set the key of the taint, or tolerate all taints with operator: Exists.", '49:59: spec.compute.tolerations[0].tolerationSeconds: "3" is not allowed. Allowed: an integer.', "49:59: spec.compute.tolerations[0].tolerationSeconds: applies only to effect NoExecute. Remove it, or change the effect.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAfinity: {}}"}, ["48:29: spec.compute.affinity.nodeAfinity: unknown key. Did you mean nodeAffinity? Known keys: nodeAffinity, podAffinity, podAntiAffinity.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: zone-a"}, ['48:15: spec.compute.affinity: "zone-a" is not allowed. Allowed: a mapping.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: zone-a}"}, ['48:30: spec.compute.affinity.nodeAffinity: "zone-a" is not allowed. Allowed: a mapping.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: null}"}, ["48:30: spec.compute.affinity.nodeAffinity: null is not allowed. Allowed: a mapping.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerm: []}}}"}, ["48:79: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution: is missing nodeSelectorTerms, which Kubernetes requires.", "48:98: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerm: unknown key. Did you mean nodeSelectorTerms? Known keys: nodeSelectorTerms.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: gpu, operator: in, values: [a100]}]}]}}}"}, ['48:141: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].operator: "in" is not allowed. Did you mean In? Allowed: In, NotIn, Exists, DoesNotExist, Gt, Lt.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: gpu, operator: Gt, values: [7]}]}]}}}"}, ["48:154: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].values[0]: 7 is not allowed. Allowed: a string in quotes.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 200, preference: {}}]}}"}, ["48:90: spec.compute.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight: 200 is not allowed. Allowed: an integer from 1 to 100.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: {weight: 20, preference: {}}}}"}, ['48:80: spec.compute.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution: a mapping with "weight" and "preference" is not allowed. Allowed: a list.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {podAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{labelSelector: {matchLabels: {app: 1}}}]}}"}, ["48:79: spec.compute.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0]: is missing topologyKey, which Kubernetes requires.", "48:115: spec.compute.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].labelSelector.matchLabels.app: 1 is not allowed. Allowed: a string in quotes.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: zone, labelSelector: {matchExpressions: [{key: a, operator: Gt}]}}]}}"}, ['48:157: spec.compute.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].labelSelector.matchExpressions[0].operator: "Gt" is not allowed. Allowed: In, NotIn, Exists, DoesNotExist.', ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: [registry, registry]"}, ["48:34: spec.compute.imagePullSecrets[1]: registry is listed twice. Remove one of them.", ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: [Registry]"}, ['48:24: spec.compute.imagePullSecrets[0]: "Registry" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: registry"}, ['48:23: spec.compute.imagePullSecrets: "registry" is not allowed. Allowed: a list of up to 16, each the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: [{name: registry}]"}, ['48:24: spec.compute.imagePullSecrets[0]: a mapping with "name" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    annotations: {-team: vision}"}, ['48:19: spec.compute.annotations.-team: "-team" is not allowed as a key. Allowed: a Kubernetes annotation key: [prefix/]name, where name has at most 63 letters, digits, hyphens, underscores and dots.', ]),
    ({"    nodeSelector: {gpu: a100}": "    annotations: {team: 7}"}, ["48:25: spec.compute.annotations.team: 7 is not allowed. Allowed: a string; quote numbers, true and false.", ]),
    ({"    nodeSelector: {gpu: a100}": "    annotations: {a/b/c: vision}"}, ['48:19: spec.compute.annotations.a/b/c: "a/b/c" is not allowed as a key. Allowed: a Kubernetes annotation key: [prefix/]name, where name has at most 63 letters, digits, hyphens, underscores and dots.', ]),
    ({"    nodeSelector: {gpu: a100}": f"    annotations: {{team: {'x' * 70000}}}"}, ["48:18: spec.compute.annotations: the total size of 70004 bytes exceeds 65536. Store large values elsewhere.", ]),
    ({"    nodeSelector: {gpu: a100}": "    serviceAccountName: Trainer"}, ['48:25: spec.compute.serviceAccountName: "Trainer" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    serviceAccountName: a..b"}, ['48:25: spec.compute.serviceAccountName: "a..b" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCA: company-ca"}, ['48:14: spec.compute.extraCA: "company-ca" is not allowed. Allowed: a mapping with configMap, key.', ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCA: {key: ca.crt}"}, ["48:14: spec.compute.extraCA.configMap: is required. Name of the ConfigMap. Allowed: the name of a Kubernetes object: a-z, 0-9, hyphen and dot, at most 253 characters.", ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCA: {configMap: company-ca, key: ../ca.crt}"}, ['48:43: spec.compute.extraCA.key: "../ca.crt" is not allowed. Allowed: a ConfigMap key: letters, digits, hyphen, underscore and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCa: {configMap: company-ca}"}, ["48:5: spec.compute.extraCa: unknown key. Did you mean extraCA? Known keys: gpus, cpu, memory, sharedMemory, scratch, precision, queue, deadlineSeconds, retries, ttlSecondsAfterFinished, nodeSelector, tolerations, affinity, priorityClassName, serviceAccountName, imagePullSecrets, annotations, extraCA, prefetch, terminationGracePeriodSeconds, checkpointMinutes.", ]),
    ({"    nodeSelector: {gpu: a100}": "    prefetch: yes"}, ['48:15: spec.compute.prefetch: "yes" is not allowed. Did you mean true? Allowed: true or false.', ]),
    ({"    nodeSelector: {gpu: a100}": "    terminationGracePeriodSeconds: 10"}, ["48:36: spec.compute.terminationGracePeriodSeconds: 10 is not allowed. Allowed: an integer from 30 to 3600.", ]),
    ({"    nodeSelector: {gpu: a100}": "    terminationGracePeriodSeconds: 5m"}, ['48:36: spec.compute.terminationGracePeriodSeconds: "5m" is not allowed. Allowed: an integer from 30 to 3600.', ]),
    ({"    nodeSelector: {gpu: a100}": "    priorityClassName: -high"}, ['48:24: spec.compute.priorityClassName: "-high" is not allowed. Allowed: a Kubernetes name: a-z, 0-9, hyphen and dot, at most 63 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    queue: team..a"}, ['48:12: spec.compute.queue: "team..a" is not allowed. Allowed: a Kubernetes name: a-z, 0-9, hyphen and dot, at most 63 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    nodeSelector: {a..b/gpu: a100}"}, ['48:20: spec.compute.nodeSelector.a..b/gpu: "a..b/gpu" is not allowed as a key. Allowed: a Kubernetes label key: [prefix/]name, where name has at most 63 letters, digits, hyphens, underscores and dots.', ]),
    ({"{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}": "{key: a, operator: Exists, effect: NoSchedule, tolerationSeconds: 3}"}, ["49:85: spec.compute.tolerations[0].tolerationSeconds: applies only to effect NoExecute. Remove it, or change the effect.", ]),
    ({"  seed: 42": "\tseed: 42"}, ["51:1: YAML does not allow tabs for indentation. Replace them with spaces.", ]),
    ({"  seed: 42": "  seed: [42"}, ["52:1: is not valid YAML: while parsing a flow sequence; expected ',' or ']', but got '<stream end>'.", ]),
    ({"  seed: 42": "  seed: *none"}, ["51:9: is not valid YAML: found undefined alias 'none'.", ]),
    ({"  seed: 42": "  seed: !!python/object:os.system 42"}, ['51:9: spec.seed: the tag "tag:yaml.org,2002:python/object:os.system" is not allowed. Remove it.', ]),
    ({"  seed: 42": "  seed: &me [*me]"}, ["51:9: spec.seed[0]: the alias refers to a value that contains it.", ]),
    ({"  seed: 42": '  seed: "\\uD800"'}, ["51:9: spec.seed: contains an unpaired surrogate, which is not a valid character.", ]),
    ({"  seed: 42": "  seed: 99999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999"}, ["51:9: spec.seed: a number of 101 characters is too long. The maximum is 100.", ]),
    ({"  seed: 42": "  seed: 42\n  : 7"}, ["52:3: spec.: a key must be a string, but found nothing. Add quotes.", ]),
    ({"  seed: 42": "  seed: 4\u00002"}, ['51:10: the character "\\u0000" is not allowed in YAML.', ]),
]


def edit(changes: dict[str, str]) -> str:
    text = VALID
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    return text


def test_valid_spec_is_accepted() -> None:
    assert [job.metadata.name for job in read_text(VALID, "job.yaml")] == ["cats-vs-dogs"]


@pytest.mark.parametrize(("changes", "problems"), MISTAKES, ids=[problems[0][:60] for _, problems in MISTAKES])
def test_mistake_is_reported_with_position_and_message(changes: dict[str, str], problems: list[str]) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_text(edit(changes), "job.yaml")
    expected = [line.replace("{APPLICATIONS}", APPLICATIONS) for line in problems]
    assert [str(problem) for problem in caught.value.problems] == [f"job.yaml:{line}" for line in expected]


def test_all_mistakes_are_reported_at_once() -> None:
    text = edit(
        {
            "name: cats-vs-dogs": "name: Cats",
            "train[40%:50%]": "train[30%:50%]",
            "epochs: 20": "epochs: twenty",
            "gpus: 2": "gpus: 3",
            "atLeast: 0.95": "atLest: 0.95",
            "learningRate: 1.0e-5": "learningRate: 0.1",
        }
    )
    with pytest.raises(InvalidSpecError) as caught:
        read_text(text, "job.yaml")
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (5, "metadata.name"),
        (14, "spec.dataset.splits.validation"),
        (26, "spec.transfer.epochs"),
        (27, "spec.transfer.batchSize"),
        (35, "spec.fineTune.optimizer.learningRate"),
        (39, "spec.evaluate.gates[0].atLest"),
    ]


def test_messages_contain_no_secrets() -> None:
    assert not [problems for _, problems in MISTAKES if "hush-hush" in "".join(problems)]
